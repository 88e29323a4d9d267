"""What a user can do about a refused site, by the words of the refusal."""

from __future__ import annotations

import re

GENERAL = (
    "Nothing is wrong: Inductor compiles these nodes as it would without this backend. To have "
    "them fused, bring the line above to a form in the support table, or write a rewrite for it."
)

# The first that matches is shown, so the special ones come first.
_ADVICE = (
    (
        r"the rewrite failed",
        "This is a bug in this package; the graph was left as it was. Please report it with the "
        'output of TORCH_LOGS="+inductor_moe".',
    ),
    (
        r"which the graph dequantises",
        "The kernels read codes in a layout of their own, made once when the model is loaded: "
        "inductor_moe.repack_(model) for weights of torchao, inductor_moe.replace_weight(module, "
        "name, codes, scales, zeros) for any others. See docs/how-to/quantised.md.",
    ),
    (
        r"ranks' values|before it is waited for|a package does without",
        "Nothing to do: the sum over the ranks is the process group's own, with the same result.",
    ),
    (
        r"numbered|router's choices|the choices|every choice|not the router's",
        "Nothing to do: the choices are numbered for the experts of this rank by a kernel of "
        "Inductor's between the router and the experts, both of which are fused all the same.",
    ),
    (
        r"used by output|inside the expert block|used outside|has another user|read elsewhere"
        r"|used in several ways",
        "A value inside the layer is also needed outside, and the fused op does not produce it. "
        "If it is a hook, a logged tensor or an extra output, remove it from the compiled call.",
    ),
    (
        r"not row-wise|has a value for each row",
        "Between the two expert GEMMs each row must be computed from that row alone. A mean, a "
        "norm over the tokens or a mask there has another meaning once the rows are reordered.",
    ),
    (
        r"no second expert GEMM",
        "The down projection must be computed from the up projection of the same tokens row by "
        "row, through elementwise functions and views; something in between is read as neither.",
    ),
    (
        r"symbolic",
        "The number of experts, or of experts per token, must be known at compile time. Compile "
        "with dynamic=False, or mark that size static with torch._dynamo.mark_static.",
    ),
    (
        r"has no name",
        "The function between the two expert GEMMs is none that the op computes. Experts with "
        "silu, gelu (exact or tanh), relu or squared relu, gated or not, are fused as a whole.",
    ),
    (
        r"second softmax|no known function of the chosen scores|number of experts per|per token",
        "The router computes its weights in a way that moe_route does not. The router stays as it "
        "is; its experts are fused all the same.",
    ),
    (
        r"scale both the input and the output|applies a second routing weight|no routing weight",
        "The op applies one routing weight per token and expert, on the input or on the output. "
        "Multiply the two weights into one before the experts.",
    ),
    (
        r"sort|offsets|does not count|bins",
        "Grouped experts are read from the sort, the counts and the cumulative sum that order "
        "their rows. Compute them from the same expert numbers, as transformers does.",
    ),
    (
        r"not the delta rule|cuts through an axis|computes in float",
        "The calls were evaluated and compute something else than the op, or in another "
        "precision. Compare the update with the docstring of inductor_moe::delta_rule: decay, "
        "correction, write, read.",
    ),
    (
        r"rounds .* values",
        "A cast to fewer bits changes values that the op would keep. Remove the cast, or make it "
        "where the op rounds: before and behind the layer.",
    ),
    (
        r"packed|a linear layer|output dtype of its own",
        "Packed weights are fused where they are used as they are, by a linear layer or by "
        "experts. Elsewhere they are dequantised first, which is right but saves no time.",
    ),
    (
        r"another number of experts|other ids|same experts|different inputs",
        "Both products of a pair of token and expert must use that pair's expert: the same "
        "expert numbers, the same number of experts, the same tokens.",
    ),
    (
        r"routing weight|pair|sum over the experts|sum is not over|sum the rows|tokens",
        "Each pair of token and expert has one row, one weight and one place in the sum over a "
        "token's experts. Repeat the tokens, weigh the rows and sum them pair by pair.",
    ),
    (
        r"bias",
        "A bias must have the shape [experts, out] and be gathered by the ids that gather the "
        "weights.",
    ),
    (
        r"convolution|the state|new state|new inputs|no single token|no decay|q, k",
        "The decode step was not recognised as a whole. The delta rule itself is still one op if "
        "the report has a fused delta_rule for this module.",
    ),
)


def on_refusal(reason: str) -> str:
    """What to do about a site that was refused for `reason`."""
    return next((text for words, text in _ADVICE if re.search(words, reason)), GENERAL)


_TRANSFORMERS = (
    "In a transformers model it is the loop over the experts that were hit: "
    'model.set_experts_implementation("grouped_mm"), or inductor_moe.compile(model), replaces it. '
)
_SORT = (
    "To have experts fused, gather the weights for each pair of token and expert, or sort the "
    "pairs."
)

# The first that matches is shown.
_BREAKS = (
    (
        r"[Dd]ata-dependent (branching|control|jump|assert)",
        "No setting of Dynamo traces a branch on values. In a loop over experts leave the "
        "condition out: an expert without tokens adds nothing. " + _TRANSFORMERS + _SORT,
    ),
    (
        r"_local_scalar_dense|\.item\(|\.tolist\(|capture_scalar_outputs",
        "torch._dynamo.config.capture_scalar_outputs = True traces .item() and .tolist(); "
        "inductor_moe.compile(model) turns it on where a forward calls them. A count that decides "
        "how long a slice is may break all the same. " + _TRANSFORMERS + _SORT,
    ),
    (
        r"nonzero|[Dd]ynamic shape|bincount|data-dependent",
        "torch._dynamo.config.capture_dynamic_output_shape_ops = True traces nonzero, where and "
        "masks as indices; inductor_moe.compile(model) turns it on where a forward has them. "
        + _TRANSFORMERS
        + _SORT,
    ),
)


def on_break(reason: str) -> str:
    """What to do about a graph break of Dynamo with this reason."""
    for words, text in _BREAKS:
        if re.search(words, reason):
            return text
    return (
        "What lies on both sides of a break is compiled apart. "
        'TORCH_LOGS="graph_breaks" names the line.'
    )
