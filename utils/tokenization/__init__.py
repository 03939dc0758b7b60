"""Text to token ids and back: the tokenizer that fits a model, packing into windows, masking.

What `TextTokenizer.encode` takes apart, `TextTokenizer.decode` puts together again, unless
`TextTokenizer.lossless` says otherwise.
"""

from utils.tokenization.adaptive_tokenizer import TextTokenizer, choose_tokenizer
from utils.tokenization.masking import mask_tokens
from utils.tokenization.packing import document_positions, pack_causal, pack_masked
from utils.tokenization.pretrained import Candidate, own_tokenizer, public_tokenizer

__all__ = [
    "Candidate",
    "TextTokenizer",
    "choose_tokenizer",
    "document_positions",
    "mask_tokens",
    "own_tokenizer",
    "pack_causal",
    "pack_masked",
    "public_tokenizer",
]
