"""One process of a parallel run on the CPU: builds a model, steps it, and writes what it computed.

Run under torchrun by support.parallel; arguments are one JSON object.
"""

import json
import os
import sys
from itertools import accumulate

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def main(job: dict) -> None:
    from megatron_carve import patches

    patches.cpu_mode.apply()
    patches.layer_symbols.apply()
    patches.adam_resume.apply()
    from megatron_carve.model.stack import MixerStack

    patches.mtp_stack(MixerStack).apply()
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if job.get("without"):
        from support import mutations

        getattr(mutations, job["without"])()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=job["tp"],
        pipeline_model_parallel_size=job["pp"],
        context_parallel_size=job["cp"],
        virtual_pipeline_model_parallel_size=job["virtual"] if job["virtual"] > 1 else None,
        expert_model_parallel_size=job["ep"],
        expert_tensor_parallel_size=1 if job["ep"] > 1 else None,
    )
    model_parallel_cuda_manual_seed(7)
    config = transformer_config(job)
    models = load_models(config, job)
    ddp, optimizer = trainer(config, models, job)
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    results: dict = {"losses": [], "grad_norms": []}
    record = Record(models[0], job)
    for step in range(job["steps"]):
        for chunk in ddp:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        batches = [iter(micro_batches(job, step)) for _ in ddp]
        reports = get_forward_backward_func()(
            forward_step_func=lambda data, model: forward_step(data, model, job, record),
            data_iterator=batches if len(ddp) > 1 else batches[0],
            model=ddp,
            num_microbatches=job["micro_batches"] // parallel_state.get_data_parallel_world_size(),
            seq_length=job["seq_length"],
            micro_batch_size=job["micro_batch_size"],
            forward_only=False,
        )
        if step == 0:
            results |= record.whole()
            results["gradients"] = whole_gradients(models, job)
        _, norm, _ = optimizer.step()
        results["losses"].append(mean_loss(reports, world))
        results["grad_norms"].append(float(norm))
    if rank == 0:
        torch.save(results, job["out"])
    dist.barrier()
    dist.destroy_process_group()


def load_models(config, job: dict) -> list[torch.nn.Module]:
    """The parts of the model on this rank, one for each virtual pipeline stage; saved or loaded as the job says."""
    from megatron.core import dist_checkpointing

    models = [build_model(config, job, stage) for stage in range(job["virtual"])]
    if job.get("save"):
        # Zero-initialised and constant parameters would hide errors: make every parameter matter.
        for model in models:
            perturb(model)
        os.makedirs(job["save"], exist_ok=True)
        dist_checkpointing.save(sharded(models), job["save"])
    else:
        loaded = dist_checkpointing.load(sharded(models), job["load"])
        for name, model in enumerate(models):
            model.load_state_dict(loaded[str(name)], strict=True)
    return models


def trainer(config, models: list[torch.nn.Module], job: dict):
    """(the models as Megatron trains them, the optimizer)"""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    reduction = DistributedDataParallelConfig(
        use_distributed_optimizer=job["distributed_optimizer"], grad_reduce_in_fp32=True
    )
    ddp = [
        DistributedDataParallel(config, reduction, model, disable_bucketing=stage > 0)
        for stage, model in enumerate(models)
    ]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=2e-3, weight_decay=0.0, clip_grad=0.0, params_dtype=config.params_dtype,
            use_distributed_optimizer=job["distributed_optimizer"],
        ),
        ddp,
    )  # fmt: skip
    return ddp, optimizer


def transformer_config(job: dict):
    from megatron_carve.run.task import MixerTransformerConfig

    return MixerTransformerConfig(
        num_layers=len(job["pattern"].split("/")[0].replace("|", "")),
        mtp_num_layers=job["pattern"].count("/") or None,
        hidden_size=32,
        num_attention_heads=job.get("heads", 4),
        num_query_groups=job.get("groups"),
        ffn_hidden_size=48,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        mixer={"content_rank": 4, **job.get("mixer", {})},
        mixer_recompute=job.get("mixer_recompute", False),
        mixer_context=job.get("mixer_context", "auto"),
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        is_hybrid_model=True,
        transformer_impl="local",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        window_size=(job["window"] - 1, 0) if job["window"] else None,
        tensor_model_parallel_size=job["tp"],
        pipeline_model_parallel_size=job["pp"],
        context_parallel_size=job["cp"],
        sequence_parallel=job["sp"],
        pipeline_dtype=getattr(torch, job["dtype"]),
        params_dtype=getattr(torch, job["dtype"]),
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        deallocate_pipeline_outputs=True,
        virtual_pipeline_model_parallel_size=job["virtual"] if job["virtual"] > 1 else None,
        calculate_per_token_loss=True,
        recompute_granularity=job.get("recompute"),
        recompute_method="uniform" if job.get("recompute") == "full" else None,
        recompute_num_layers=1 if job.get("recompute") == "full" else None,
        recompute_modules=job.get("recompute_modules"),
        **experts(job),
        # batched, two ranks would mistake each other's forward and backward messages
        batch_p2p_comm=job["virtual"] == 1,
        overlap_p2p_comm=job["virtual"] > 1,
    )


def experts(job: dict) -> dict:
    """Megatron's fields for E layers."""
    if "E" not in job["pattern"]:
        return {}
    return {
        "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_token_dispatcher_type": "alltoall",
        "moe_shared_expert_intermediate_size": 40, "expert_model_parallel_size": job["ep"],
        "expert_tensor_parallel_size": 1 if job["ep"] > 1 else job["tp"],
    }  # fmt: skip


def build_model(config, job: dict, stage: int):
    from megatron.core import parallel_state
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_carve.specs import stack_spec

    spec = stack_spec("local", attention_convolution=job.get("attention_convolution", "none"))
    return HybridModel(
        config,
        spec,
        vocab_size=64,
        max_sequence_length=job["seq_length"],
        hybrid_layer_pattern=job["pattern"],
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        vp_stage=stage if job["virtual"] > 1 else None,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def sharded(models: list[torch.nn.Module]) -> dict:
    from megatron.core import parallel_state

    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return {str(i): model.sharded_state_dict(metadata=metadata) for i, model in enumerate(models)}


def perturb(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def micro_batches(job: dict, step: int) -> list[torch.Tensor]:
    """This data-parallel rank's [B, T+1] token batches."""
    from megatron.core import parallel_state

    generator = torch.Generator().manual_seed(100 + step)  # the same tokens on every rank
    shape = (job["micro_batches"], job["micro_batch_size"], job["seq_length"] + 1)
    tokens = torch.randint(0, 64, shape, generator=generator)
    return list(tokens.chunk(parallel_state.get_data_parallel_world_size())[parallel_state.get_data_parallel_rank()])


def forward_step(data_iterator, model, job: dict, record: "Record"):
    tokens = next(data_iterator)
    positions = torch.arange(job["seq_length"]).expand(tokens.shape[0], -1)
    by_token = [tokens[:, :-1], tokens[:, 1:], positions]
    packed = packed_documents(job["documents"]) if job["documents"] else None
    if job["rows"]:
        by_token, packed = [x.reshape(1, -1) for x in by_token], documents_in_rows(job)
    inputs, labels, positions = (x[:, local_places(job)] for x in by_token)
    output = model(inputs, positions, None, labels=labels, packed_seq_params=packed)
    record.output(output)

    def loss(losses):
        total = losses.float().sum()
        count = torch.tensor(losses.numel(), dtype=torch.int)
        return total, count, {"loss": torch.stack([total.detach(), count.float()])}

    return output, loss


def packed_documents(lengths: list[int]):
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def documents_in_rows(job: dict):
    from megatron_carve.model.context.documents import Documents

    starts = [torch.tensor([0, *accumulate(lengths)][:-1], dtype=torch.int32) for lengths in job["rows"]]
    filled = torch.nn.utils.rnn.pad_sequence(starts, batch_first=True, padding_value=job["seq_length"])
    return Documents.of_rows(filled, job["seq_length"])


def local_places(job: dict) -> torch.Tensor:
    """The positions that Megatron gives to this context-parallel rank."""
    from megatron.core import parallel_state
    from support.parallel import places

    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    return places(rank, size, job["documents"] or [job["seq_length"]] * len(job["rows"] or [1]))


class Record:
    """Losses by token, and gradients of the embedded tokens, of the micro-batches of the first step on this rank."""

    def __init__(self, model: torch.nn.Module, job: dict) -> None:
        from megatron.core import parallel_state

        self.job, self.outputs, self.d_embedded = job, [], []
        self.last = parallel_state.is_pipeline_last_stage()
        self.embedded_once = True
        if model.pre_process:
            model.register_forward_pre_hook(self.begin)
            model.embedding.register_forward_hook(self.embedded)

    def begin(self, *_) -> None:
        self.embedded_once = False

    def embedded(self, module, _, output) -> None:
        """Watch what the model begins with; a head for further tokens embeds again."""
        if not self.embedded_once and output.requires_grad:
            output.register_hook(lambda d: self.d_embedded.append(d.detach().clone()))
        self.embedded_once = True

    def output(self, output: torch.Tensor) -> None:
        if output.ndim == 2:
            self.outputs.append(output.detach().clone())

    def whole(self) -> dict[str, torch.Tensor]:
        """From all ranks: {"outputs": [micro-batch, B, T], "d_embedded": [micro-batch, B, T, hidden]}."""
        from megatron.core import parallel_state

        local = local_places(self.job)
        tp, tp_rank = self.job["tp"], parallel_state.get_tensor_model_parallel_rank()
        replica = parallel_state.get_data_parallel_rank()
        pieces = {"outputs": [], "d_embedded": []}
        batches = self.job["micro_batches"] // parallel_state.get_data_parallel_world_size()
        for i, x in enumerate(self.outputs[:batches]):
            pieces["outputs"].append((replica * batches + i, local, x))
        mine = local.chunk(tp)[tp_rank] if self.job["sp"] else local
        # Pipeline schedules take the backward of micro-batches in the order of their forward.
        for i, d in enumerate(self.d_embedded[:batches]):
            pieces["d_embedded"].append((replica * batches + i, mine, d.transpose(0, 1)))
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, pieces)
        shape = (self.job["micro_batches"], self.job["micro_batch_size"], self.job["seq_length"])
        if self.job["rows"]:
            shape = (shape[0], 1, shape[1] * shape[2])
        found = {"outputs": torch.full(shape, torch.nan), "d_embedded": torch.full((*shape, 32), torch.nan)}
        for theirs in everyone:
            for name, parts in theirs.items():
                for i, where, x in parts:
                    found[name][i, :, where] = x
        return found


def mean_loss(reports: list[dict], world: int) -> float:
    from megatron.core import parallel_state

    total = sum((r["loss"] for r in reports), torch.zeros(2))
    if parallel_state.is_pipeline_last_stage():
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.broadcast(total, src=world - 1)
    return (total[0] / total[1]).item()


def whole_gradients(models: list[torch.nn.Module], job: dict) -> dict[str, torch.Tensor]:
    """Every parameter's gradient, put together from all ranks through the sharded checkpoint's own description."""
    from megatron.core import dist_checkpointing, parallel_state

    parameters = [item for model in models for item in model.named_parameters()]
    if job["distributed_optimizer"] and parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1:
        gather_scattered_gradients([p for _, p in parameters])
    with torch.no_grad():
        kept = [p.detach().clone() for _, p in parameters]
        for _, p in parameters:
            p.copy_(p.main_grad)
        check_replicas(parameters)
        folder = job["out"] + ".gradients"
        if dist.get_rank() == 0:
            os.makedirs(folder)
        dist.barrier()
        dist_checkpointing.save(sharded(models), folder)
        for (_, p), value in zip(parameters, kept, strict=True):
            p.copy_(value)
    dist.barrier()
    if dist.get_rank():
        return {}
    dcp_to_torch_save(folder, folder + ".pt")
    stored = torch.load(folder + ".pt", weights_only=False)
    return {name: value for name, value in stored.items() if isinstance(value, torch.Tensor)}


def gather_scattered_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """With the distributed optimizer a rank holds the sum over replicas for its own shard of the buffer only."""
    from megatron.core import parallel_state

    groups = {
        True: parallel_state.get_data_parallel_group(with_context_parallel=True),
        False: parallel_state.get_expert_data_parallel_group(),  # of experts that are spread over ranks
    }
    buffers = {id(p.main_grad.untyped_storage()): p for p in parameters}
    for parameter in buffers.values():
        view, group = parameter.main_grad, groups[getattr(parameter, "allreduce", True)]
        whole = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())
        shards = list(whole.chunk(group.size()))
        for owner, shard in zip(dist.get_process_group_ranks(group), shards, strict=True):
            dist.broadcast(shard, src=owner, group=group)


def check_replicas(parameters: list[tuple[str, torch.nn.Parameter]]) -> None:
    """A parameter that every tensor-parallel rank holds must have the same gradient on each."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    for name, p in parameters:
        if not getattr(p, "tensor_model_parallel", False):
            everyone = [torch.empty_like(p) for _ in range(group.size())]
            dist.all_gather(everyone, p.detach().contiguous(), group=group)
            for other in everyone:
                torch.testing.assert_close(other, everyone[0], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    main(json.loads(sys.argv[1]))
