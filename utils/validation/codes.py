"""Why each kind of finding matters, in a sentence for people; where in the code to look for it; what explains what."""

MEANING = {
    "future_leakage": "Training loss will look excellent and generation will be noise.",
    "batch_leakage": "The answer for one sample depends on which others happen to be beside it.",
    "padding_leakage": "The answer for a text depends on how far it was padded.",
    "padding_idx_wrong": "The padding token is learned as if it were content, or a real token never learns.",
    "position_absent": "The model cannot tell 'dog bites man' from 'man bites dog'.",
    "vocab_mismatch": "Some ids cannot be read or predicted, or crash in the middle of training.",
    "shape_crash": "The first batch of that shape ends the run.",
    "shape_limit": "Batches of other lengths end the run, unless the data are padded.",
    "constant_output": "No input can change the answer, so there is nothing to learn.",
    "ignored_input": "The answer is the same for every input.",
    "zero_gradient": "The first step moves nothing, and so does every later one.",
    "cannot_learn": "A model that cannot learn one batch by heart cannot learn anything larger.",
    "dead_relu": "No gradient passes here: what lies before keeps its starting values for ever.",
    "detached_submodule": "This part keeps its random starting values for ever.",
    "unused_parameter": "This part costs memory and can never learn.",
    "unregistered_layer": "The optimizer never sees this part, and saving, moving and casting leave it behind.",
    "lazy_parameter": "An optimizer made before the first forward pass never sees these parameters.",
    "frozen_parameter": "This part keeps its present values while everything around it changes.",
    "backward_crash": "Training cannot take its first step.",
    "exploding_gradient": "The first steps will throw the weights far off or to NaN.",
    "vanishing_gradient": "The early layers learn thousands of times slower than the late ones.",
    "missing_residual": "Without its skip connection this block must relearn everything that came before it.",
    "missing_attention_scale": "Attention starts saturated on single tokens, and its gradient is close to nothing.",
    "wrong_softmax_dim": "The weights are shared out along the wrong axis and no longer choose among positions.",
    "nan_output": "One such batch turns all weights into NaN.",
    "nan_long_sequence": "Short tests pass, and the first long batch turns all weights into NaN.",
    "nan_padding": "The first batch with a fully padded row turns all weights into NaN.",
    "low_precision_unsafe": "Mixed precision, the default on GPUs, will give NaN or noise.",
    "exploding_init": "Training starts far above chance and may never settle.",
    "vanishing_init": "The signal dies before it reaches the loss, so nothing is learned.",
    "symmetric_init": "Equal units get equal gradients: a wide layer learns like a single unit.",
    "zero_init": "Nothing before this weight can learn.",
    "embedding_scale": "The model starts almost blind to which token it reads, and stays so for hundreds of steps.",
    "double_softmax": "Softmax of a softmax is nearly flat: the loss hardly moves and its gradient is tiny.",
    "wrong_builtin_loss": "The loss the model returns is not the loss of its own predictions.",
    "label_shift": "The model is trained to predict the wrong token: the one it reads, or one too far ahead.",
    "dropout_in_eval": "Predictions are random at inference, and so are validation numbers.",
    "nondeterministic_forward": "The same input gives another answer each time: nothing can be compared or resumed.",
    "train_eval_ignored": "What should differ between training and inference does not, or the other way round.",
    "state_across_calls": "Looking at the model changes it: results depend on how often it was called.",
    "input_mutation": "The caller's batch is changed under its hands: labels made from it afterwards are wrong.",
    "memory_growth": "Each call keeps a little more memory, until the run ends.",
    "quadratic_memory": "Memory grows with the square of the length, though linear growth was promised.",
    "slow_python_loop": "Time is spent in Python instead of arithmetic.",
    "buffer_not_registered": "A saved and reloaded model gives other answers, and moving it to a GPU breaks it.",
    "shared_weight": "Two parts that look separate train as one.",
    "hardcoded_device": "The model breaks as soon as it is moved to another device.",
    "hardcoded_dtype": "The model breaks as soon as it is cast to bfloat16, float16 or float64.",
    "out_of_memory": "Training will stop with an out-of-memory error.",
    "process_died": "The same call would have ended the notebook's kernel or the training run, and lost all in it.",
    "timed_out": "A forward pass that does not come back stops everything after it.",
}

MADE = frozenset({
    "unused_parameter", "unregistered_layer", "lazy_parameter", "frozen_parameter", "shared_weight",
    "buffer_not_registered", "padding_idx_wrong", "embedding_scale", "exploding_init", "vanishing_init",
    "symmetric_init", "zero_init",
})  # fmt: skip
"""Faults of how a part is made: the place in the code is the line that makes it."""
CALLED = frozenset({"detached_submodule", "missing_residual", "dead_relu", "dropout_in_eval"})
"""Faults of how a part is used: the place in the code is the line that calls it."""
RAISED = frozenset({"shape_crash", "vocab_mismatch", "backward_crash", "hardcoded_device", "shape_limit"})
"""Crashes: the place in the code is the line that raised."""
ROOTS = ("process_died", "timed_out", "out_of_memory", "shape_crash", "nan_output")
"""What explains other findings, and is told before them."""
OF_NAN = frozenset({
    "embedding_scale", "low_precision_unsafe", "cannot_learn", "exploding_gradient", "exploding_init",
    "vanishing_gradient", "vanishing_init", "nan_long_sequence",
})  # fmt: skip
"""What may be nothing but a consequence where the output is NaN: warnings of these codes are left out there."""
