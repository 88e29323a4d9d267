"""Every error and warning class. Each text says what, got versus limit, what to do."""


class InductorMoeError(Exception):
    """Base of the errors raised by inductor_moe."""


class UnknownOptionError(InductorMoeError, ValueError):
    """An option key that does not exist, or a value of the wrong type."""


class StrictError(InductorMoeError, RuntimeError):
    """Raised under ``inductor_moe.strict`` where the default would only report."""


class QuantizationError(InductorMoeError, ValueError):
    """A model or a checkpoint that cannot be quantised, saved or loaded as asked."""


class ParallelError(InductorMoeError, RuntimeError):
    """A model or a mesh that `parallelize` cannot take, or a rank that did not arrive."""


class VerificationError(InductorMoeError, RuntimeError):
    """Under ``verify`` and ``strict``: a rewritten graph computed something else."""


class VerificationWarning(UserWarning):
    """Under ``verify``: a rewritten graph computed something else and was undone."""


class ExportError(InductorMoeError, RuntimeError):
    """A model that export_generation cannot take, or an argument of it that is off."""


class PackageError(InductorMoeError, RuntimeError):
    """A package that needs Python, is damaged, or does not fit this version or device."""


class GenerationError(InductorMoeError, ValueError):
    """A prompt or a setting that a generation package cannot serve."""


class TrainingGraphWarning(UserWarning):
    """A graph traced with gradients was left to Inductor."""


class RewriteFailedWarning(UserWarning):
    """An exception inside a rewrite; the graph was left as it was."""


class FallbackWarning(UserWarning):
    """A feature of the platform is missing and a slower path is used."""
