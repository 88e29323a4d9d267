"""What `int4.py check` checks: the kernels on packed weights against fp64."""

from __future__ import annotations

import torch
from int4 import Experts, exact, random_packed

from inductor_moe.ops.quant_cuda import quantized_linear_cuda
from inductor_moe.quant.fit import Scheme
from inductor_moe.quant_tiles import QuantizedExperts, QuantizedLinear, choose_quantized_plan
from inductor_moe.testing import relative_error
from inductor_moe.tiles import gpu_of

LIMIT = 3e-3


def check() -> int:
    """Errors against fp64 on fresh inputs: every kernel and scheme."""
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    schemes = {
        Scheme(4, 128, True, "rtn"): torch.bfloat16,
        Scheme(4, 64, False, "rtn"): torch.float16,
        Scheme(4, 32, True, "rtn"): torch.bfloat16,
        Scheme(4, 16, False, "rtn"): torch.bfloat16,
        Scheme(8, 0, True, "rtn"): torch.bfloat16,
    }
    bad = count = 0

    def judge(what: str, error: float, limit: float) -> None:
        nonlocal bad, count
        count += 1
        if not error <= limit:
            bad += 1
            print(f"seed {seed} {what}: {error:.2e} > {limit:.2e}", flush=True)

    gpu = gpu_of(0)
    for scheme, dtype in schemes.items():
        layer = QuantizedExperts(4, 12, 320, 192, True, scheme.bits, scheme.group_size)
        up = random_packed((12, 384, 320), scheme, dtype)
        down = random_packed((12, 320, 192), scheme, dtype)
        for tokens in (1, 3, 17, 700):
            inputs = Experts.draw(layer, up, down, tokens, 1)
            found = inputs.run(choose_quantized_plan(layer, tokens, gpu))
            what = f"experts {scheme.describe()} {dtype} T={tokens}"
            # Four roundings to 16 bits lie between input and output, h among them.
            judge(what, relative_error(found, inputs.reference()), LIMIT * 1.7)
        for tokens, outputs, width in ((1, 96, 2048), (1, 200, 328), (33, 200, 328)):
            weight = random_packed((outputs, width), scheme, dtype)
            linear = QuantizedLinear(outputs, width, scheme.bits, scheme.group_size)
            x = torch.randn(tokens, width, device="cuda").to(dtype)
            for kind in ("random", "large mean", "huge channel"):
                value = x + 50 if kind == "large mean" else x.clone()
                if kind == "huge channel":
                    value[:, width // 3] *= 1000
                found = quantized_linear_cuda(
                    value, weight.packed, weight.scales, weight.zeros, None, scheme.group_size,
                    plan=choose_quantized_plan(linear, tokens, gpu),
                )  # fmt: skip
                reference = value.double() @ exact(weight, scheme.group_size, width).T
                what = f"linear {scheme.describe()} {dtype} M={tokens} {outputs}x{width} {kind}"
                judge(what, relative_error(found, reference), LIMIT)
    print(f"check: {count - bad} of {count} agree with fp64 (seed {seed})", flush=True)
    return bad + check_model()


def check_model() -> int:
    """A quantised layer compiled with the backend, against the same weights unpacked, in fp64."""
    from inductor_moe import quantize_, reports

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(512, 1024), torch.nn.Linear(1024, 512)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)))

    bad = 0
    for method, dtype in (("hqq", "int4"), ("rtn", "int8")):
        torch._dynamo.reset()
        model = Layer().cuda().bfloat16()
        quantize_(model, dtype, method=method, verbose=False)
        compiled = torch.compile(model, backend="inductor_moe", fullgraph=True)
        with torch.no_grad():
            for tokens in (1, 40):
                x = torch.randn(tokens, 512, device="cuda").bfloat16()
                middle = torch.relu(
                    x.double() @ model.first.weight.double().T + model.first.bias.double()
                )
                reference = middle @ model.second.weight.double().T + model.second.bias.double()
                error = relative_error(compiled(x), reference)
                matched = reports()[-1].counts()
                # Here the reference's weights are rounded to bf16, the kernels' are not.
                if not error <= 2 * LIMIT or matched != {"quantized_linear": 2}:
                    bad += 1
                    print(f"compiled {dtype} {method} M={tokens}: {error:.2e} {matched}")
    print(f"check: compiled layers, {bad} bad", flush=True)
    return bad
