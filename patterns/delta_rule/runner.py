"""Running the nodes of a region one by one on labelled values."""

from __future__ import annotations

from typing import Any

from torch import fx

from inductor_moe.patterns.delta_rule.labels import FLOATS, Label, Labelled, Values, merge_labels
from inductor_moe.patterns.delta_rule.rules import RULES
from inductor_moe.patterns.evaluate import CannotEvaluate
from inductor_moe.patterns.moe.activation import POINTWISE
from inductor_moe.patterns.walk import CASTS, COPIES, SHAPES, aten, sizes

ELEMENTWISE = POINTWISE | {
    aten.bitwise_and.Tensor,
    aten.bitwise_not.default,
    aten.bitwise_or.Tensor,
    aten.eq.Scalar,
    aten.eq.Tensor,
    aten.logical_and.default,
    aten.logical_not.default,
    aten.logical_or.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.ne.Scalar,
    aten.ne.Tensor,
    aten.pow.Tensor_Tensor,
    aten.exp2.default,
}


class Runner(Values):
    """Runs nodes whose inputs are given."""

    def compute(self, node: fx.Node) -> None:
        """Run one node whose inputs have been run. Raises CannotEvaluate."""
        if node.op != "call_function":
            raise CannotEvaluate(f"{node.name} is no call")
        try:
            self.values[node] = self._compute(node)
        except (RuntimeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise CannotEvaluate(f"{node.name}: {error}") from error

    def _compute(self, node: fx.Node) -> Labelled:
        target: Any = node.target
        if target in ELEMENTWISE:
            return self._elementwise(node)
        if target in CASTS:
            return self._cast(node)
        if target in COPIES:
            return self.value(node.args[0])
        if target in SHAPES:
            return self.reshape(self.value(node.args[0]), sizes(node.args[0]), sizes(node))
        rule = RULES.get(target)
        if rule is None:
            raise CannotEvaluate(f"{node.name} calls {target}")
        return rule(self, node)

    def _elementwise(self, node: fx.Node) -> Labelled:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode"):
            raise CannotEvaluate(f"{node.name} has {dict(node.kwargs)}")
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        labels: tuple[Label, ...] = ()
        for operand in operands:
            labels = merge_labels(labels, self.value(operand).labels)
        args = [self.values[a].tensor if isinstance(a, fx.Node) else a for a in node.args]
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("dtype", "alpha")}
        target: Any = node.target
        return Labelled(target(*args, **kwargs), labels)

    def _cast(self, node: fx.Node) -> Labelled:
        x, to = self.value(node.args[0]), node.meta["val"].dtype
        if to in FLOATS:
            return Labelled(x.tensor.double(), x.labels)
        if x.tensor.dtype.is_floating_point:
            raise CannotEvaluate(f"{node.name} casts to {to}")
        return Labelled(x.tensor.to(to), x.labels)
