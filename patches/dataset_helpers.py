"""Skip the build of Megatron's dataset helpers, which the wheel ships built."""

from collections.abc import Callable

from megatron_carve.patches.patch import Patch, Replacement


def _use_the_built_one(_build: Callable[[], None]) -> Callable[[], None]:
    def compile_helpers() -> None:
        import megatron.core.datasets.helpers_cpp  # noqa: F401  an ImportError here is the true problem

    return compile_helpers


dataset_helpers = Patch(
    name="dataset_helpers",
    reason="initialize_megatron runs make where the wheel has a built helpers_cpp and no Makefile, and exits",
    upstream="megatron/core/datasets/utils.py, compile_helpers",
    remove_when="the released wheel starts megatron.training without a Makefile",
    replacements=[Replacement("megatron.core.datasets.utils:compile_helpers", _use_the_built_one)],
)
