"""AOTInductor packages with our rewrites inside."""

from inductor_moe.aoti.packaging import aoti_compile_and_package, inductor_configs

__all__ = ["aoti_compile_and_package", "inductor_configs"]
