"""`Rank`: one process of a replica, from its config to a runner that has run.

Start-up is accounted for by phase, in `phases` and in the log: config, weights, cache, warmup, on a GPU kernels and
graphs, and on rank 0 grammars (seconds).
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch

from kernels.backend import use_triton
from kernels.invariant_linear import launches_of
from workers.api.config import KVCacheSpec, ReplicaConfig
from workers.api.errors import ConfigError, EngineFault
from workers.api.ordering import Ordering
from workers.api.replica import BYTES, Stage
from workers.api.request import EngineRequest, FinishReason, SamplingParams
from workers.context import LayerCache
from workers.engine.core import Engine
from workers.engine.grammar import Grammars
from workers.engine.plan import Executor, NewSequence, ScheduledSequence, StepMasks, StepPlan, StepResult
from workers.execution.cache import allocate, block_bytes, count_blocks
from workers.execution.inputs import BatchState
from workers.execution.memory import free_bytes, peak_bytes, readable
from workers.execution.rehearsal import LONGEST, rehearse
from workers.execution.runner import Runner
from workers.execution.swap import HostCache
from workers.layers.attention import Attention
from workers.layers.build import Build
from workers.layers.embedding import ParallelLMHead
from workers.layers.linear import ParallelLinear
from workers.layers.moe import Experts
from workers.layers.rotary import with_dynamic_scaling
from workers.models.base import CausalModel, read_config
from workers.models.loader import load_model
from workers.models.registry import find, import_model_file
from workers.parallel.attendance import Attendance
from workers.parallel.group import Groups
from workers.parallel.peer_memory import share_memory
from workers.parallel.votes import share_board

log = logging.getLogger("echelon.rank")

_COMPILERS = 8  # threads


class Rank:
    """A loaded, warmed-up rank.

    `groups` come from `workers.parallel.group.connect`; without them the rank is alone. `gpu` is the index of its
    device where several are seen (None: by its number), `host` what tells its host from others. `threads` is for
    torch.set_num_threads (None leaves it). `threaded`: on the CPU, run steps in a worker thread. `peer_memory`: sum
    through the ranks' memory where that is possible. `at` is told each phase as it begins, and how far it is.
    Raises ConfigError, WeightError or OutOfMemory.
    """

    def __init__(
        self,
        config: ReplicaConfig,
        *,
        rank: int = 0,
        groups: Groups | None = None,
        gpu: int | None = None,
        host: str = "",
        threads: int | None = None,
        threaded: bool = False,
        peer_memory: bool = True,
        at: Callable[[Stage], None] = lambda stage: None,
    ) -> None:
        self.config, self.rank = config, rank
        self._at = at
        self.groups = groups or Groups()
        self.phases: dict[str, float] = {}
        if self.groups.tp.size != config.tensor_parallel:
            raise ConfigError(
                f"the config has tensor_parallel = {config.tensor_parallel}, the rank's group {self.groups.tp.size}"
            )
        if threads is not None:
            torch.set_num_threads(threads)
        with self._phase("config"):
            self.device = _device(config.device, rank if gpu is None else gpu)
            if peer_memory:
                self.groups = replace(self.groups, tp=share_memory(self.groups.tp, self.device, host))
            if self.groups.tp.size > 1:
                tp = share_board(self.groups.tp, self.device, host)
                self.groups = replace(self.groups, tp=replace(tp, attendance=Attendance()))
            source = read_config(config.model.path)
            factor = config.model.rope_scaling_factor
            if factor is not None:
                source = with_dynamic_scaling(source, factor)
            for file in config.model.model_files:
                import_model_file(file)
            model_class = find(source, config.model.implementation, trusted_folder=config.model.trusted_folder)
            trained = model_class.context_length(source)
            self.max_model_len = config.model.max_model_len or trained
            longest = max(trained, model_class.longest_context(source))
            if factor is not None and longest < int(trained * factor):
                raise ConfigError(f"{model_class.__name__} takes no rope_scaling_factor")
            if self.max_model_len > longest:
                raise ConfigError(f"max_model_len {self.max_model_len} is over the checkpoint's {longest} tokens")
            dtype = _dtype(config.model.dtype, source, self.device)
            if config.engine.batch_invariant:
                _check_invariance(self.device, self.groups.tp.size)
        with self._phase("weights"):
            make_build = Build.invariant if config.engine.batch_invariant else Build
            build = make_build(dtype=dtype, device=self.device, groups=self.groups)
            with torch.inference_mode():
                self.model: CausalModel = model_class(source, max_model_len=self.max_model_len, build=build).eval()
            if config.engine.batch_invariant and not self.model.batch_invariant:
                raise ConfigError("batch_invariant: only native models without experts have kernels that promise it")
            read = load_model(
                self.model,
                config.model.path,
                load_format=config.model.load_format,
                seed=config.model.seed,
                progress=lambda done, total: at(Stage("weights", done, total, BYTES)),
            )
        self.vocab_size = self.model.vocab_size
        with self._phase("cache"):
            self.specs: tuple[KVCacheSpec, ...] = self.model.kv_cache_specs()
            halves = self._rehearse()
            self.num_blocks = self._count_blocks()
            self.max_model_len = min(self.max_model_len, self.num_blocks * config.engine.block_size)
            caches = allocate(self.specs, self.num_blocks, config.engine.block_size, self.device)
            self.num_host_blocks = self._count_host_blocks()
            swap = HostCache(caches, self.num_host_blocks) if self.num_host_blocks else None
            self.runner = self._make_runner(caches, threaded=threaded, halves=halves, swap=swap)
        with self._phase("warmup"):
            self._warm_up()
        if self.device.type == "cuda":
            with self._phase("kernels"):
                self._compile_kernels(caches)
        if self._captures:
            with self._phase("graphs"):
                self.runner.capture(
                    config.engine.max_num_batched_tokens,
                    lambda done, total: at(Stage("graphs", done, total, "shapes")),
                )
        self.grammars: Grammars | None = None
        if rank == 0:  # which has the engine
            with self._phase("grammars"):
                self.grammars = self._make_grammars()
        per_block = block_bytes(self.specs, config.engine.block_size)
        log.info(
            "rank %d: %s on %s in %s, %s of weights, %d KV blocks (%s), context %d; %s",
            rank, config.model.name, self.device, str(dtype).removeprefix("torch."), readable(read), self.num_blocks,
            readable(self.num_blocks * per_block), self.max_model_len,
            ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.phases.items()),
        )  # fmt: skip

    def make_engine(self, executor: Executor | None = None, ordering: Ordering | None = None) -> Engine:
        """An engine over `executor` (default: this rank's runner alone); one at a time, since it owns all blocks."""
        return Engine(
            self.config.engine,
            executor or self.runner,
            num_blocks=self.num_blocks,
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            grammars=self.grammars,
            ordering=ordering,
            num_host_blocks=self.num_host_blocks,
            prompts_apart_from=self.model.prompts_apart_from,
        )

    def _make_grammars(self) -> Grammars | None:
        """Looked through here, and not while there are streams: that takes seconds for a large vocabulary."""
        try:
            found = Grammars.of_folder(self.config.model.path, self.vocab_size)
        except ConfigError as e:
            log.info("rank %d: %s", self.rank, e)
            return None
        if words := found.prepare():
            log.warning("rank %d: %s", self.rank, words)
        return found

    def set_timeout(self, seconds: float) -> None:
        """From now on a collective that takes longer fails, see `Groups.set_timeout`."""
        self.groups.set_timeout(seconds)  # these, not those that we were given: they have the exchange

    def close(self) -> None:
        """Wait for submitted steps and stop the runner's thread."""
        self.runner.close()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._at(Stage(name))
        started = time.perf_counter()
        yield
        self.phases[name] = time.perf_counter() - started

    @property
    def _captures(self) -> bool:
        """Whether steps become CUDA graphs; the same on all ranks."""
        return self.config.engine.cuda_graphs and self.model.captures and self.device.type == "cuda"

    def _make_runner(
        self,
        caches: list[LayerCache],
        *,
        threaded: bool = False,
        halves: bool = False,
        swap: HostCache | None = None,
    ) -> Runner:
        state = BatchState(
            max_num_seqs=self.config.engine.max_num_seqs,
            max_model_len=self.max_model_len,
            block_size=self.config.engine.block_size,
            vocab_size=self.vocab_size,
            device=self.device,
            batch_invariant=self.config.engine.batch_invariant,
            by_length=self.model.prompts_apart_from is not None,
        )
        return Runner(
            self.model,
            caches,
            state,
            rank=self.rank,
            group=self.groups.tp,
            threaded=threaded,
            collect=self.rank == 0,
            halves=halves,
            swap=swap,
        )

    def _count_blocks(self) -> int:
        engine = self.config.engine
        if engine.num_blocks is not None:
            return self._same_everywhere(engine.num_blocks)
        if self.device.type == "cpu":
            return self._same_everywhere(count_blocks(self.specs, engine, self.max_model_len, engine.cache_bytes_cpu))
        activations = peak_bytes(self.device, self._profile)
        available = int((free_bytes(self.device) - activations) * engine.cache_fraction)
        log.info("rank %d: a full step takes %s, the cache gets %s", self.rank, readable(activations),
                 readable(available))  # fmt: skip
        return self._same_everywhere(count_blocks(self.specs, engine, self.max_model_len, available))

    def _count_host_blocks(self) -> int:
        engine = self.config.engine
        if engine.eviction_type != "copy":
            return 0
        if engine.num_cpu_blocks is not None:
            return self._same_everywhere(engine.num_cpu_blocks)
        size = block_bytes(self.specs, engine.block_size)
        if engine.swap_space < size:
            raise ConfigError(f"swap_space of {engine.swap_space} bytes holds no block of {size}")
        return self._same_everywhere(engine.swap_space // size)

    def _same_everywhere(self, blocks: int) -> int:
        """The least count of all ranks: one plan must fit every one."""
        return min(count for (count,) in self.groups.tp.agree([blocks], self.device))

    def _rehearse(self) -> bool:
        """Whether a step without memory can run in parts: alone a rank always can, several see to it here."""
        attendance, engine = self.groups.tp.attendance, self.config.engine
        if attendance is None:
            return True
        told: int | str = f"the context of {self.max_model_len} tokens is too short"
        if self.max_model_len >= LONGEST:
            caches = allocate(self.specs, -(-LONGEST // engine.block_size), engine.block_size, self.device)
            passes, tokens = self._make_runner(caches).passes, engine.max_num_batched_tokens
            told = rehearse(passes, attendance, tokens, min(engine.max_num_seqs, tokens))
        if isinstance(told, str):
            log.warning("rank %d: a step that is out of memory will end the replica: %s", self.rank, told)
            return False
        log.info("rank %d: %s are set aside for steps without memory", self.rank, readable(told))
        return True

    def _profile(self) -> None:
        """The largest step: max_num_batched_tokens over as many sequences as there may be, sampled with filters."""
        engine = self.config.engine
        tokens = engine.max_num_batched_tokens
        # Not more sequences than slots, and none longer than the context.
        seqs = min(engine.max_num_seqs, tokens)
        count = min(max(tokens // seqs, 1), self.max_model_len)
        blocks = -(-count // engine.block_size)
        caches = allocate(self.specs, seqs * blocks, engine.block_size, self.device)
        params = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9)
        plan = StepPlan(
            0,
            (),
            tuple(NewSequence(i, (0,) * count, count, params, ()) for i in range(seqs)),
            tuple(ScheduledSequence(i, 0, count, 1, tuple(range(i * blocks, (i + 1) * blocks))) for i in range(seqs)),
        )
        _run(self._make_runner(caches), plan)  # in one piece, or not at all

    def _compile_kernels(self, caches: list[LayerCache]) -> None:
        """Compile every kernel that a step may launch, or read it from the cache on disk: no request waits for that."""
        engine = self.config.engine
        layers = [m for m in self.model.modules() if isinstance(m, Attention)]
        shapes = {m.kernel_key: m for m in layers}
        compiled = itertools.count(1)

        def run(launch: Callable[[], None]) -> None:
            with torch.cuda.device(self.device):
                launch()
            self._at(Stage("kernels", next(compiled), unit="compiled"))

        with ThreadPoolExecutor(_COMPILERS, thread_name_prefix="echelon-compiler") as pool:
            for layer in shapes.values():
                cache = caches[layer.layer_index]
                limits = (engine.max_num_batched_tokens, engine.max_num_seqs)
                deque(pool.map(run, layer.launches(cache, *limits, batch_invariant=engine.batch_invariant)), 0)
            for mixture in {m.kernel_key: m for m in self.model.modules() if isinstance(m, Experts)}.values():
                deque(pool.map(run, mixture.launches(engine.max_num_batched_tokens)), 0)
            if engine.batch_invariant:
                deque(pool.map(run, self._invariant_products()), 0)
        try:
            self.runner.state.dense_prompts = not engine.batch_invariant and all(
                layer.plan_long_prompts(caches[layer.layer_index], engine.max_num_batched_tokens)
                for layer in shapes.values()
            )
        except RuntimeError as e:
            log.warning("rank %d: long prompts go through the paged kernel alone: %s", self.rank, e)
        torch.cuda.synchronize(self.device)

    def _invariant_products(self) -> list[Callable[[], None]]:
        """One launch of each kernel that the products of steps may take."""
        shapes: dict[tuple[torch.Size, bool], tuple[torch.Tensor, torch.Tensor | None]] = {}
        for module in self.model.modules():
            if isinstance(module, (ParallelLinear, ParallelLMHead)):
                found = dict(module.named_parameters(recurse=False))
                weight, bias = found["weight"], found.get("bias")
                shapes[weight.shape, bias is None] = weight, bias
        most = self.config.engine.max_num_batched_tokens
        return [launch for weight, bias in shapes.values() for launch in launches_of(weight, bias, most)]

    def _warm_up(self) -> None:
        """A prefill, a decode, and one with all that can be asked of a draw, so that the first request finds kernels
        compiled and memory mapped.
        """
        size = self.config.engine.block_size
        count = max(1, min(size, self.max_model_len - 1, self.config.engine.max_num_batched_tokens))
        blocks = tuple(range(min(-(-(count + 1) // size), self.num_blocks)))
        plain = SamplingParams(max_tokens=2, temperature=0.0)
        drawn = replace(plain, temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.1, logit_bias=((0, 1.0),),
                        logprobs=2, logprob_ids=(0,), seed=0)  # fmt: skip
        for params, masked in ((drawn, True), (plain, False)):
            added = NewSequence(0, (0,) * count, count, params, blocks, masked=masked)
            slots = (0,) if masked else ()
            _run(
                self.runner, StepPlan(-2, (0,), (added,), (ScheduledSequence(0, 0, count, 1),), slots), self.vocab_size
            )
        if len(blocks) * size > count:
            _run(self.runner, StepPlan(-1, (), (), (ScheduledSequence(0, count, 1, 1),)))


def run_to_completion(engine: Engine, requests: Iterable[EngineRequest]) -> dict[str, list[int]]:
    """Run `requests` to their end in this thread; returns the emitted tokens by request id.

    Raises EngineFault where one ends with an error, after all have ended.
    """
    tokens: dict[str, list[int]] = {}
    errors: list[str] = []
    for request in requests:
        tokens |= {name: [] for name in request.answer_ids}
        engine.submit(request)
    while engine.has_work:
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
            if delta.finish is FinishReason.ERROR:
                errors.append(f"{delta.request_id}: {delta.error}")
    if errors:
        raise EngineFault("; ".join(errors))
    return tokens


def _run(runner: Runner, plan: StepPlan, vocab_size: int = 0) -> StepResult:
    handle = runner.submit(plan)
    if plan.masked:
        runner.draw(StepMasks(plan.step, plan.masked, b"\xff" * (4 * -(-vocab_size // 32) * len(plan.masked))))
    result = handle.result()
    for slot in result.slots:
        if slot.fault is not None:
            raise EngineFault(f"the first step failed: {slot.fault}")
    return result


def _device(wanted: str, number: int) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError("device is cuda, but torch finds no CUDA device here")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    index = number % torch.cuda.device_count()  # a rank that sees its own GPU only has it, whatever its number
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _check_invariance(device: torch.device, ranks: int) -> None:
    """Raises ConfigError where nobody can promise batch invariance."""
    if not use_triton(torch.empty(0, device=device)):
        raise ConfigError(f"batch_invariant needs a CUDA device: products on a {device.type} do not promise it")
    if ranks > 1:
        raise ConfigError("batch_invariant needs tensor_parallel = 1: the order of sums over ranks is not fixed")


def _dtype(wanted: str, source: dict[str, object], device: torch.device) -> torch.dtype:
    if wanted == "auto":
        named = source.get("dtype") or source.get("torch_dtype")
        wanted = "float32" if device.type == "cpu" else str(named or "bfloat16")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if wanted not in dtypes:
        raise ConfigError(f"dtype {wanted!r} of the checkpoint is not supported, only {', '.join(dtypes)}")
    return dtypes[wanted]
