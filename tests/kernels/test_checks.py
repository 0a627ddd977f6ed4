"""Every mistake a caller can make gets an error that names the argument, what was expected and what came."""

import logging
from typing import Any

import pytest
import torch

from megatron_carve.kernels import (
    CarveState,
    backends,
    chunk_carve,
    chunk_gdn2,
    recurrent_carve,
    recurrent_gdn2,
    require_triton_support,
    resolve_backend,
)
from megatron_carve.kernels.backends import _log_choice

B, T, H, HV, K, V, R = 2, 5, 2, 4, 8, 6, 3
GDN2 = {"chunk": chunk_gdn2, "recurrent": recurrent_gdn2}
CARVE = {"chunk": chunk_carve, "recurrent": recurrent_carve}
FORMS = pytest.mark.parametrize("form", ["chunk", "recurrent"])


def shared_arguments(batch: int = B) -> dict[str, Any]:
    key_side = (batch, T, H, K)
    return {
        "q": torch.randn(key_side),
        "k": torch.randn(key_side),
        "v": torch.randn(batch, T, HV, V),
        "g": -torch.rand(key_side),
    }


def gdn2_arguments(batch: int = B) -> dict[str, Any]:
    return shared_arguments(batch) | {"b": torch.rand(batch, T, H, K), "w": torch.rand(batch, T, HV)}


def carve_arguments(batch: int = B) -> dict[str, Any]:
    return shared_arguments(batch) | {
        "erase_logits": torch.randn(batch, T, H, K),
        "w": torch.rand(batch, T, HV),
        "content_down": torch.randn(R, V),
        "content_up": torch.randn(K, R),
    }


def state(rows: int = B, **changes: torch.Tensor) -> CarveState:
    zeros = torch.zeros
    count = zeros(rows, dtype=torch.int64)
    return CarveState(zeros(rows, HV, K, V), zeros(rows, HV, V), zeros(rows, HV, V), count)._replace(**changes)


def packed(*ends: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(ends, dtype=dtype)


X = torch.randn
META = {"device": "meta"}
# id: (changed arguments, words of the message)
SHARED_ERRORS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "q type": ({"q": [1.0]}, ("q:", "tensor", "list")),
    "q dtype": ({"q": torch.ones(B, T, H, K, dtype=torch.int32)}, ("q:", "float32", "int32")),
    "q axes": ({"q": X(B, T, H)}, ("q:", "[B, T, H, K]", "[2, 5, 2]")),
    "no tokens": ({"q": X(B, 0, H, K)}, ("q:", "at least 1", "[2, 0, 2, 8]")),
    "k shape": ({"k": X(B, T, H, K + 1)}, ("k:", "[2, 5, 2, 8]", "[2, 5, 2, 9]")),
    "k dtype": ({"k": X(B, T, H, K).half()}, ("k:", "float32", "float16")),
    "k device": ({"k": X(B, T, H, K, **META)}, ("k:", "device", "cpu", "meta")),
    "k type": ({"k": None}, ("k:", "tensor", "NoneType")),
    "v tokens": ({"v": X(B, T + 1, HV, V)}, ("v:", "T = 5", "[2, 6, 4, 6]")),
    "v axes": ({"v": X(B, T, HV)}, ("v:", "[B, T, HV, V]", "[2, 5, 4]")),
    "v width": ({"v": X(B, T, HV, 0)}, ("v:", "at least 1", "[2, 5, 4, 0]")),
    "v dtype": ({"v": X(B, T, HV, V).bfloat16()}, ("v:", "float32", "bfloat16")),
    "value heads": ({"v": X(B, T, 3, V)}, ("v:", "HV", "multiple of H = 2", "HV = 3")),
    "g shape": ({"g": X(B, T, H)}, ("g:", "[2, 5, 2, 8]", "[2, 5, 2]")),
    "g dtype": ({"g": X(B, T, H, K).double()}, ("g:", "float32", "float64")),
    "g device": ({"g": X(B, T, H, K, **META)}, ("g:", "device", "cpu", "meta")),
    "w dtype": ({"w": torch.ones(B, T, HV, dtype=torch.int64)}, ("w:", "float32", "int64")),
    "w type": ({"w": 1.0}, ("w:", "tensor", "float")),
    "cu_seqlens type": ({"cu_seqlens": [0, T]}, ("cu_seqlens:", "tensor", "list")),
    "cu_seqlens dtype": ({"cu_seqlens": torch.tensor([0.0, 5.0])}, ("cu_seqlens:", "int32", "int64", "float32")),
    "cu_seqlens axes": ({"cu_seqlens": packed(0, T)[None]}, ("cu_seqlens:", "[N + 1]", "[1, 2]")),
    "cu_seqlens too short": ({"cu_seqlens": packed(0)}, ("cu_seqlens:", "N >= 1", "[1]")),
    "cu_seqlens device": ({"cu_seqlens": packed(0, T).to("meta")}, ("cu_seqlens:", "device", "cpu", "meta")),
    "cu_seqlens with a batch": ({"cu_seqlens": packed(0, T)}, ("cu_seqlens", "B = 1", "B = 2")),
    "scale": ({"scale": float("inf")}, ("scale:", "finite", "inf")),
    "scale type": ({"scale": "1"}, ("scale:", "a finite number", "'1'")),
    "backend": ({"backend": "cuda"}, ("backend:", "auto, torch, triton", "'cuda'")),
}
PACKED_ERRORS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "start": ({"cu_seqlens": packed(1, T)}, ("cu_seqlens:", "start at 0", "got 1")),
    "end": ({"cu_seqlens": packed(0, 4)}, ("cu_seqlens:", "end at T = 5", "got 4")),
    "order": ({"cu_seqlens": packed(0, 4, 3, T)}, ("cu_seqlens:", "nondecreasing", "got 3 after 4 at index 2")),
}
GDN2_ERRORS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "b shape": ({"b": X(B, T, HV, K)}, ("b:", "[2, 5, 2, 8]", "[2, 5, 2]", "[2, 5, 4, 8]")),
    "b of value heads": ({"b": X(B, T, HV)}, ("b:", "[B, T, H] = [2, 5, 2]", "[2, 5, 4]")),
    "w shape": ({"w": X(B, T, H, V)}, ("w:", "[2, 5, 4, 6]", "[2, 5, 4]", "[2, 5, 2, 6]")),
    "state shape": ({"initial_state": X(B, HV, V, K)}, ("initial_state:", "[2, 4, 8, 6]", "[2, 4, 6, 8]")),
    "state dtype": ({"initial_state": X(B, HV, K, V).half()}, ("initial_state:", "float32", "float16")),
    "state device": ({"initial_state": X(B, HV, K, V, **META)}, ("initial_state:", "device", "cpu", "meta")),
    "state type": ({"initial_state": state()}, ("initial_state:", "tensor", "CarveState")),
}
RAW_ERRORS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "A_log alone": ({"A_log": X(H)}, ("dt_bias:", "beside A_log", "None")),
    "dt_bias alone": ({"dt_bias": X(H, K)}, ("A_log:", "beside dt_bias", "None")),
    "A_log shape": ({"A_log": X(HV), "dt_bias": X(H, K)}, ("A_log:", "[H] = [2]", "[H, K] = [2, 8]", "[4]")),
    "dt_bias dtype": ({"A_log": X(H), "dt_bias": X(H, K).half()}, ("dt_bias:", "float32", "float16")),
    "erase_scale": ({"erase_scale": 0}, ("erase_scale:", "above 0 and at most 2", "0")),
}
CARVE_ERRORS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "erase_logits shape": ({"erase_logits": X(B, T, HV, K)}, ("erase_logits:", "[2, 5, 2, 8]", "[2, 5, 4, 8]")),
    "w shape": ({"w": X(B, T, HV, V)}, ("w:", "[B, T, HV] = [2, 5, 4]", "[2, 5, 4, 6]")),
    "content_down axes": ({"content_down": X(V)}, ("content_down:", "[R, V] or [HV, R, V]", "[6]")),
    "content_down rank": ({"content_down": X(0, V)}, ("content_down:", "R >= 1", "[0, 6]")),
    "content_down shape": ({"content_down": X(R, V + 1)}, ("content_down:", "[R, V] = [3, 6]", "[3, 7]")),
    "content_down heads": ({"content_down": X(H, R, V)}, ("content_down:", "[HV, R, V] = [4, 3, 6]", "[2, 3, 6]")),
    "content_down dtype": ({"content_down": X(R, V).half()}, ("content_down:", "float32", "float16")),
    "content_down alone": ({"content_up": None}, ("content_up:", "beside content_down", "None")),
    "content_up alone": ({"content_down": None}, ("content_down:", "beside content_up", "None")),
    "content_up shape": ({"content_up": X(K, R + 1)}, ("content_up:", "[K, R] = [8, 3]", "[8, 4]")),
    "content_up of each head": ({"content_up": X(HV, K, R)}, ("content_up:", "[K, R] = [8, 3]", "[4, 8, 3]")),
    "content_up device": ({"content_up": X(K, R, **META)}, ("content_up:", "device", "cpu", "meta")),
    "erase": ({"erase": "scalar"}, ("erase:", "diagonal, delta", "'scalar'")),
    "prediction": ({"prediction": "next"}, ("prediction:", "previous, decayed", "'next'")),
    "erase_bias shape": ({"erase_bias": X(HV, K)}, ("erase_bias:", "[H, K] = [2, 8]", "[4, 8]")),
    "erase_bias dtype": ({"erase_bias": X(H, K).half()}, ("erase_bias:", "float32", "float16")),
    "scale zero": ({"scale": 0}, ("scale:", "other than 0", "0")),
    "content_chunk multiple": ({"content_chunk": 96}, ("content_chunk:", "multiple of 64", "96")),
    "content_chunk zero": ({"content_chunk": 0}, ("content_chunk:", "positive", "0")),
    "content_chunk size": ({"content_chunk": 2**31}, ("content_chunk:", "less than 2**31", "2147483648")),
    "content_chunk type": ({"content_chunk": 64.0}, ("content_chunk:", "multiple of 64", "64.0")),
    "erase_scale": ({"erase_scale": 2.5}, ("erase_scale:", "above 0 and at most 2", "2.5")),
    "erase_scale of a decay": ({"erase_scale": 2}, ("erase_scale:", "1 with erase='diagonal'", "2")),
    "erase_scale type": ({"erase_scale": True}, ("erase_scale:", "a number", "True")),
    "content_grad": ({"content_grad": "none"}, ("content_grad:", "full, detached", "'none'")),
    "state type": ({"initial_state": X(B, HV, K, V)}, ("initial_state:", "CarveState", "Tensor")),
    "S shape": ({"initial_state": state(3)}, ("initial_state.S:", "[2, 4, 8, 6]", "[3, 4, 8, 6]")),
    "S dtype": ({"initial_state": state(S=X(B, HV, K, V).double())}, ("initial_state.S:", "float32", "float64")),
    "mean shape": ({"initial_state": state(mean=X(B, HV, K))}, ("initial_state.mean:", "[2, 4, 6]", "[2, 4, 8]")),
    "partial dtype": (
        {"initial_state": state(partial=X(B, HV, V).half())},
        ("initial_state.partial:", "float32", "float16"),
    ),
    "count dtype": (
        {"initial_state": state(count=torch.zeros(B, dtype=torch.int32))},
        ("initial_state.count:", "int64", "int32"),
    ),
    "count shape": (
        {"initial_state": state(count=torch.zeros(1, dtype=torch.int64))},
        ("initial_state.count:", "[2]", "[1]"),
    ),
    "count value": (
        {"initial_state": state(count=torch.tensor([0, 64]))},
        ("initial_state.count:", "0 <= count < content_chunk = 64", "got 64 in row 1"),
    ),
}


def table(errors: dict[str, tuple[dict[str, Any], tuple[str, ...]]]) -> Any:
    return pytest.mark.parametrize(("changes", "words"), list(errors.values()), ids=list(errors))


def assert_refused(op: Any, arguments: dict[str, Any], changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        op(**arguments | changes)
    message = str(caught.value)
    assert all(word in message for word in words), message


@FORMS
@table(SHARED_ERRORS | GDN2_ERRORS | RAW_ERRORS)
def test_gdn2_errors(form: str, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    assert_refused(GDN2[form], gdn2_arguments(), changes, words)


@FORMS
@table(SHARED_ERRORS | RAW_ERRORS | CARVE_ERRORS)
def test_carve_errors(form: str, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    assert_refused(CARVE[form], carve_arguments(), changes, words)


@FORMS
@table(PACKED_ERRORS)
def test_packed_errors(form: str, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    assert_refused(GDN2[form], gdn2_arguments(batch=1), changes, words)
    assert_refused(CARVE[form], carve_arguments(batch=1), changes, words)


@FORMS
def test_packed_state_counts_sequences(form: str) -> None:
    changes = {"cu_seqlens": packed(0, 2, T), "initial_state": torch.zeros(1, HV, K, V)}
    assert_refused(GDN2[form], gdn2_arguments(batch=1), changes, ("initial_state:", "[2, 4, 8, 6]", "[1, 4, 8, 6]"))


@FORMS
def test_states_of_float64_inputs_are_float64(form: str) -> None:
    arguments = {name: x.double() for name, x in gdn2_arguments().items()}
    changes = {"initial_state": torch.zeros(B, HV, K, V)}
    assert_refused(GDN2[form], arguments, changes, ("initial_state:", "float64", "float32"))


@FORMS
def test_arguments_after_the_tensors_are_keyword_only(form: str) -> None:
    with pytest.raises(TypeError):
        GDN2[form](*gdn2_arguments().values(), 0.5)
    with pytest.raises(TypeError):
        CARVE[form](*carve_arguments().values(), 64)


def test_triton_is_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_interpreted", lambda: False)
    with pytest.raises(NotImplementedError, match="needs a CUDA GPU, got cpu"):
        backends.resolve_backend("triton", torch.device("cpu"))


@pytest.mark.parametrize(
    ("op", "erase", "dtype", "K", "V", "words"),
    [
        ("gdn2", "", torch.bfloat16, 48, 64, ("K of 32, 64, 96, 128, 256 for gdn2 in bfloat16", "got 48")),
        ("carve", "delta", torch.float16, 256, 64, ("K of 32, 64, 96, 128 for carve with delta erase", "got 256")),
        ("carve", "delta", torch.float32, 128, 256, ("V of 32, 64, 96, 128", "beside K = 128", "got 256")),
        ("carve", "diagonal", torch.bfloat16, 256, 64, ("K of 32, 64, 96, 128 for carve with diagonal", "got 256")),
        ("carve", "diagonal", torch.float16, 64, 128, ("V of 32, 64 for carve with diagonal erase in", "got 128")),
        ("recurrent", "", torch.float64, 64, 64, ("no float64", "use backend='torch'")),
    ],
)
def test_what_triton_lacks_is_named(
    op: str, erase: str, dtype: torch.dtype, K: int, V: int, words: tuple[str, ...]
) -> None:
    with pytest.raises(NotImplementedError) as caught:
        require_triton_support(op, dtype, K, V, erase=erase)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
def test_triton_takes_every_width_of_gdn2(width: int, dtype: torch.dtype) -> None:
    require_triton_support("gdn2", dtype, width, width)
    require_triton_support("carve", dtype, width, width, erase="delta", content=False)


def test_auto_is_triton_on_a_gpu_and_torch_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    _log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="megatron_carve.kernels.backends"):
        for backend in ("torch", "auto", "auto"):
            assert resolve_backend(backend, torch.device("cpu")) == "torch"
    assert resolve_backend("auto", torch.device("cuda")) == "triton"
    assert [record.message for record in caplog.records] == ["backend 'auto' on cpu: torch"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mixer.conv_width=9", "expected at most 8 taps in the short convolution, got 9"),
        (
            "mixer={short_convolution: dynamic, convolution_rank: 65}",
            "at most 64 features .* of dynamic taps, 4 of them for heads of 32 in float32, got 65",
        ),
        (
            "model={pattern: '*', attention_convolution: dynamic, attention_head_dim: 48}",
            "expected model.attention_head_dim of 32, .* for attention's dynamic taps, got 48",
        ),
        ("mixer.key_head_dim=48", "expected K of 32, 64 for carve with diagonal erase in float32, got 48"),
    ],
)
def test_recipe_beyond_the_kernels_is_refused_before_the_start(change, message):
    from megatron_carve.recipe import load_recipe
    from megatron_carve.run.preflight import check_backend

    with pytest.raises(NotImplementedError, match=f"model.mixer_backend: .*{message}"):
        check_backend(load_recipe("debug", [change]), "cuda")
