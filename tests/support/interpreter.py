"""Where kernel tests run: on the GPU if there is one, else on the CPU in Triton's interpreter.

Importing this module switches the interpreter on where it is needed, whatever was imported before. Triton decides at
decoration whether a function is compiled or interpreted, so new functions follow `triton.knobs.runtime.interpret`, and
those that exist already (of Triton's own library and of our kernels, when a test collected earlier imported them) are
changed in place: every reference to them stays valid. The environment is left alone, so child processes start as usual.
"""

import functools
import gc
import sys
from typing import Any

import torch
import triton
from support.bfloat16 import teach_bfloat16
from triton.language.core import tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class InterpretedAfterwards(JITFunction):
    """What a function that was decorated for compilation becomes."""

    interpreted: InterpretedFunction

    def run(self, *args: Any, **options: Any) -> Any:
        return self.interpreted.run(*args, **options)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.interpreted(*args, **options)


def interpret() -> None:
    """Make this process interpret Triton functions from now on, those decorated earlier included."""
    exported, triton.knobs.propagate_env = triton.knobs.propagate_env, False
    triton.knobs.runtime.interpret = True
    triton.knobs.propagate_env = exported
    if content := sys.modules.get("megatron_carve.kernels.triton_backend.content"):
        content.INTERPRETED.value = True  # the one thing that our kernels choose by it, when they are imported
    for function in [x for x in gc.get_objects() if type(x) is JITFunction]:
        function.interpreted = InterpretedFunction(function.fn)
        function.__class__ = InterpretedAfterwards
    # A method such as x.sum() is found by name in compiled code; interpreted, it has to bind x.
    for name, member in list(vars(tensor).items()):
        if isinstance(member, InterpretedAfterwards):
            setattr(tensor, name, functools.partialmethod(member))


if DEVICE == "cpu":
    if not triton.knobs.runtime.interpret:
        interpret()
    teach_bfloat16()
