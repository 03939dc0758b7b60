"""Text to token ids and back: BPE trained to exactly a model's vocabulary, packing into windows, masking.

Everything here is lossless: what `TextTokenizer.encode` takes apart, `TextTokenizer.decode` puts together again.
"""

from utils.tokenization.adaptive_tokenizer import TextTokenizer, choose_tokenizer
from utils.tokenization.masking import mask_tokens
from utils.tokenization.packing import pack_causal, pack_masked

__all__ = ["TextTokenizer", "choose_tokenizer", "mask_tokens", "pack_causal", "pack_masked"]
