"""A cluster in one YAML file, checked by pydantic: unknown keys are refused with their place."""

from __future__ import annotations

import difflib
import importlib.resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster import __version__
from cluster.edge import BUFFER_BYTES, EdgeSettings
from cluster.environment import DEMO_MODEL, cpu_count
from cluster.names import PORT
from router.dispatch.dispatcher import DispatcherConfig
from router.dispatch.scaling import ScalingConfig
from router.foreign.node import NodeSpec
from router.foreign.upstream import checked_url
from router.http.config import Cors, FrontConfig
from router.protocol.json_entry import MAX_BODY_BYTES
from router.qos.file import load_qos_config
from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.api.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A part of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AutoscalingSection(Section):
    """How many replicas, by what the dispatcher expects; see `router.dispatch.scaling.ScalingConfig`. In seconds."""

    min_replicas: Positive = 1
    max_replicas: Positive
    target_wait: Seconds = 1.0
    target_busy: Annotated[float, Field(gt=0, le=1)] = 0.7
    up_after: Annotated[float, Field(ge=0)] = 5.0
    down_after: Annotated[float, Field(ge=0)] = 60.0
    cooldown: Annotated[float, Field(ge=0)] = 60.0

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas is over max_replicas")
        return self


class EngineSection(Section):
    """Limits of each engine; see `workers.api.config.EngineConfig`."""

    block_size: Positive = 16
    max_num_seqs: Positive = 128
    max_num_batched_tokens: Positive = 2048
    num_blocks: Positive | None = None
    cache_fraction: Annotated[float, Field(gt=0, le=1)] = 0.8
    cache_bytes_cpu: Positive = 256 << 20
    prefix_caching: bool = True
    step_ahead: bool = True
    cuda_graphs: bool = True
    batch_invariant: bool = False
    eviction_type: Literal["recompute", "copy"] = "recompute"
    num_cpu_blocks: Positive | None = None
    swap_space: Positive = 4 << 30


class ModelSection(Section):
    """Which model, how many replicas of it, and on what."""

    path: str = DEMO_MODEL  # a local folder, a hub id, or "demo" for the embedded model
    name: str | None = None  # as clients say it; default: the last part of the path
    replicas: Positive = 1  # with autoscaling: at the start; default there: min_replicas
    autoscaling: AutoscalingSection | None = None
    tensor_parallel: Positive = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    max_model_len: Positive | None = None  # tokens
    seed: int = 0
    revision: str | None = None  # of a hub id
    implementation: Literal["auto", "native", "transformers"] = "auto"  # auto: native where there is a native one
    model_files: tuple[str, ...] = ()  # Python files that register models or rewrites, the same path on every node
    rope_scaling_factor: Annotated[float, Field(gt=1, le=1024)] | None = None  # dynamic NTK: max_model_len may grow so
    chat_template: str | dict[str, Any] | None = None  # a built-in name, a file, or pieces; default: the checkpoint's
    capability: Literal["completion", "infilling", "chat", "python"] | None = None  # default: the template's
    tool_call_parser: str | None = None  # how answers show calls; default: by the chat template; "none"
    reasoning_parser: str | None = None  # how they show thoughts; the same
    trust_remote_code: bool = False  # run modelling code that lies in the checkpoint's folder
    step_timeout: Annotated[float, Field(gt=0)] = 10.0  # seconds: a rank silent, or in one step, for so long is hung
    start_timeout: Seconds = 600.0  # a rank whose start stands still for so long is hung; a download counts as one step
    drain_timeout: Annotated[float, Field(ge=0)] = 30.0  # seconds that a replica may finish in; the rest is moved
    upgrade: Literal["auto", "start_first", "stop_first"] = "auto"  # auto: start_first where Ray has room for one more
    engine: EngineSection | None = None  # all limits of its engines; default: the file's `engine`
    qos: str | None = None  # its own QoS file; default: dispatch.qos

    @model_validator(mode="before")
    @classmethod
    def _starts_with_the_least(cls, values: Any) -> Any:
        scaling = values.get("autoscaling") if isinstance(values, dict) else None
        if isinstance(scaling, dict) and "replicas" not in values:
            return {**values, "replicas": scaling.get("min_replicas", 1)}
        return values

    @model_validator(mode="after")
    def _within_bounds(self) -> Self:
        scaling = self.autoscaling
        if scaling is not None and not scaling.min_replicas <= self.replicas <= scaling.max_replicas:
            raise ValueError(f"replicas is {self.replicas}: outside of autoscaling's bounds")
        return self

    @property
    def public_name(self) -> str:
        """The name that clients use."""
        return self.name or Path(self.path.rstrip("/")).name

    @property
    def most_ranks(self) -> int:
        """That there will ever be, of all replicas."""
        return self.most_replicas * self.tensor_parallel

    @property
    def most_replicas(self) -> int:
        """That there will ever be."""
        return self.replicas if self.autoscaling is None else self.autoscaling.max_replicas


class HttpSection(Section):
    """Where the front listens, and what it puts up with."""

    host: str = "127.0.0.1"
    no_auth: bool = False  # serve more than loopback although there are no API keys
    api_keys: str | None = None  # key file, the same path on every node; relative: to the cluster file
    port: Port = PORT
    pages: bool = True  # show the web pages at /chat and /operator
    ingress_replicas: Positive = 1
    tls_cert: str | None = None  # PEM file with the certificate and its chain: then the front speaks HTTPS
    tls_key: str | None = None  # PEM file with the certificate's key, not encrypted
    max_connections: Annotated[int, Field(ge=1, le=1_000_000)] = 4096  # of clients at once; others wait to be let in
    max_body_bytes: Annotated[int, Field(ge=1024)] = MAX_BODY_BYTES  # of one request; beyond it 413
    header_timeout: Seconds = 5.0  # for a request's line and headers; then 408
    body_timeout: Seconds = 120.0  # for a whole body; then 408
    idle_timeout: Seconds = 60.0  # while a client neither sends nor takes what it should
    keep_alive_timeout: Seconds = 60.0  # between two requests of one connection
    session_ttl: Seconds = 3600.0  # that an interactive session's history is kept after its last round
    max_sessions: Positive = 1000  # of an owner; the longest idle one makes room for a new one
    trust_request_chat_template: bool = False  # whether all may bring a chat template, not admins' keys alone

    allow_origins: tuple[str, ...] = ()  # of web pages that may ask (CORS), or "*"; default: none
    allow_credentials: bool = False
    allow_methods: tuple[str, ...] = ("*",)
    allow_headers: tuple[str, ...] = ("*",)

    @model_validator(mode="after")
    def _certificate_with_key(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key are given together or not at all")
        return self

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.no_auth and self.api_keys is not None:
            raise ValueError("no_auth and api_keys exclude each other")
        return self


class NodeSection(Section):
    """A foreign OpenAI-compatible server."""

    url: str
    models: tuple[str, ...] = ()  # default: what it lists
    speed: Annotated[float, Field(gt=0)] | None = None  # prompt tokens a second, until it was measured
    key: Annotated[str, Field(repr=False)] = ""  # that the server wants


class DispatchSection(Section):
    """How a replica is chosen."""

    strategy: Literal["min_expected_latency", "min_observed_latency", "random", "round_robin", "power_of_two"] = (
        "min_expected_latency"
    )
    max_waiting: Positive = 10_000  # requests that wait for a lease; beyond it 429
    nodes: tuple[NodeSection, ...] = ()
    qos: str | None = None  # QoS file (docs/qos.md), the same path on every node; relative: to the cluster file


class PlacementSection(Section):
    """What is waited for in a Ray cluster that is joined, before anything is placed."""

    nodes: Positive = 1  # that have joined, the head included
    wait: Annotated[float, Field(ge=0)] = 0.0  # seconds for them to join, and to have room for every replica


class LogSection(Section):
    """What our processes write to stderr, which Ray keeps in a file for each."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class ClusterConfig(Section):
    """The whole file. One with several models lists them under `models`; `model` is then the first."""

    model: ModelSection = ModelSection()
    models: tuple[ModelSection, ...] = ()
    engine: EngineSection = EngineSection()
    http: HttpSection = HttpSection()
    dispatch: DispatchSection = DispatchSection()
    placement: PlacementSection = PlacementSection()
    log: LogSection = LogSection()

    @model_validator(mode="before")
    @classmethod
    def _first_of_several(cls, values: Any) -> Any:
        several = values.get("models") if isinstance(values, dict) else None
        if not isinstance(several, list | tuple) or not several:
            return values
        if "model" in values and values["model"] != several[0]:
            raise ValueError("model and models exclude each other")
        return {**values, "model": several[0]}

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        for name in self.names:
            if self.names.count(name) > 1:
                raise ValueError(f"two models are called {name}: give one of them another name")
        return self

    @property
    def each(self) -> tuple[ClusterConfig, ...]:
        """One config a model, as if it were alone: its `model`, and its own limits and QoS file for the file's."""
        return tuple(self._alone(section) for section in self.models or (self.model,))

    def _alone(self, section: ModelSection) -> ClusterConfig:
        engine = section.engine or self.engine
        dispatch = self.dispatch.model_copy(update={"qos": section.qos or self.dispatch.qos})
        own = section.model_copy(update={"engine": engine})
        return self.model_copy(update={"model": own, "models": (), "engine": engine, "dispatch": dispatch})

    @property
    def names(self) -> tuple[str, ...]:
        """Of all models, as clients say them."""
        return tuple(section.public_name for section in self.models or (self.model,))

    def of(self, name: str) -> ClusterConfig:
        """The one of `each` whose model has that name. Raises ConfigError where there is none."""
        for alone in self.each:
            if alone.model_name == name:
                return alone
        raise ConfigError(f"there is no model {name!r} in the file; there are: {', '.join(self.names)}")

    def with_model(self, section: ModelSection) -> ClusterConfig:
        """The same with `section` in the place of the model of that name."""
        if not self.models:
            return self.model_copy(update={"model": section})
        models = tuple(section if one.public_name == section.public_name else one for one in self.models)
        return self.model_copy(update={"model": models[0], "models": models})

    @property
    def qos_files(self) -> dict[str | None, Path]:
        """The QoS file of all models that have none of their own (None), and those of the others by name."""
        files = {section.public_name: section.qos for section in self.models or (self.model,)}
        found: dict[str | None, Path] = {name: Path(path) for name, path in files.items() if path is not None}
        return found if self.dispatch.qos is None else {None: Path(self.dispatch.qos), **found}

    def dispatcher_config(self) -> DispatcherConfig:
        """What the dispatcher is told. Raises ConfigError where the QoS file or a node's URL is bad."""
        dispatch = self.dispatch
        qos = {model: load_qos_config(path) for model, path in self.qos_files.items()}
        return DispatcherConfig(
            strategy=dispatch.strategy,
            models=self.names,
            max_waiting=dispatch.max_waiting,
            qos=qos.get(None),
            own_qos={model: own for model, own in qos.items() if model is not None},
            nodes=tuple(NodeSpec(checked_url(n.url), n.models, n.speed, n.key) for n in dispatch.nodes),
        )

    def front_config(self, edge_secret: str) -> FrontConfig:
        """What an ingress is told; `edge_secret` is what the proxy in front of it shows."""
        return FrontConfig(
            max_body_bytes=self.http.max_body_bytes,
            body_seconds=self.http.body_timeout,
            stalled_seconds=self.http.idle_timeout,
            pages=self.http.pages,
            edge_secret=edge_secret,
            cors=self._cors(),
            session_ttl=self.http.session_ttl,
            max_sessions=self.http.max_sessions,
            trust_request_chat_template=self.http.trust_request_chat_template,
            version=__version__,
        )

    def _cors(self) -> Cors | None:
        http = self.http
        if not http.allow_origins:
            return None
        return Cors(http.allow_origins, http.allow_credentials, http.allow_methods, http.allow_headers)

    def edge_settings(self, edge_secret: str) -> EdgeSettings:
        """What the proxy in front of the ingresses is told."""
        http = self.http
        return EdgeSettings(
            secret=edge_secret,
            host=http.host,
            max_body_bytes=http.max_body_bytes,
            max_connections=http.max_connections,
            header_timeout=http.header_timeout,
            buffer_timeout=self.front_config(edge_secret).body_deadline(BUFFER_BYTES),
            idle_timeout=http.idle_timeout,
            keep_alive_timeout=http.keep_alive_timeout,
            tls_cert=http.tls_cert,
            tls_key=http.tls_key,
        )

    def scaling(self) -> ScalingConfig | None:
        """What decides how many replicas there are; None: the file alone."""
        section = self.model.autoscaling
        return None if section is None else ScalingConfig(**section.model_dump())

    @property
    def model_name(self) -> str:
        """The name that clients use, of the first model."""
        return self.model.public_name

    def replica_config(self, device: str) -> ReplicaConfig:
        """What the ranks of the first model are told; each resolves the path on its own node. Raises ConfigError."""
        m = self.model
        return ReplicaConfig(
            model=ModelConfig(
                path=m.path,
                name=self.model_name,
                dtype=m.dtype,
                load_format=m.load_format,
                max_model_len=m.max_model_len,
                seed=m.seed,
                implementation=m.implementation,
                model_files=m.model_files,
                trust_remote_code=m.trust_remote_code,
                rope_scaling_factor=m.rope_scaling_factor,
            ),
            engine=EngineConfig(**(m.engine or self.engine).model_dump()),
            tensor_parallel=m.tensor_parallel,
            device=device,
            step_timeout=m.step_timeout,
            start_timeout=m.start_timeout,
            log_level=self.log.level,
            log_format=self.log.format,
        )


def read_cluster_config(path: Path) -> ClusterConfig:
    """The file, checked. Raises ConfigError with the line or the key that is wrong."""
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not UTF-8: {e}") from e
    except yaml.YAMLError as e:
        raise ConfigError(f"{path} is not YAML: {e}") from e
    return checked_config({} if data is None else data, str(path))


def checked_config(values: Any, source: str) -> ClusterConfig:
    """The config of `values`. Raises ConfigError with `source` and every key that is wrong."""
    try:
        return ClusterConfig.model_validate(values)
    except ValidationError as e:
        places = "; ".join(f"{'.'.join(map(str, d['loc'])) or 'the file'}: {d['msg']}" for d in e.errors())
        raise ConfigError(f"{source}: {places}") from e


def resolve_model(
    path: str, revision: str | None = None, *, code: bool = False, download_dir: str | None = None
) -> Path:
    """The local folder of a checkpoint: the embedded model, a folder, or a hub id (downloaded, with `code` its Python
    files too, into `download_dir`; None: the hub's cache). Raises ConfigError.
    """
    if path == DEMO_MODEL:
        return Path(str(importlib.resources.files("configs") / "demo-model"))
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} has no config.json: it is not a checkpoint in the Hugging Face layout")
        return folder.resolve()
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(f"{path!r} is neither a folder here nor a hub id of the form owner/name{_nearest(folder)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", *(["*.py"] if code else [])]
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted, cache_dir=download_dir))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        raise ConfigError(f"cannot get {path!r} from the model hub: {e}. A local folder works without it.") from e


def _nearest(folder: Path) -> str:
    """What else might have been meant."""
    parent = folder.absolute().parent
    there = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, there, 1)
    if near:
        return f": did you mean {parent / near[0]}?"
    return "" if parent.is_dir() else f": there is no folder {parent}"


def threads_per_rank(config: ClusterConfig) -> int:
    """CPU threads for each rank when all replicas share this machine."""
    return max(1, cpu_count() // sum(alone.model.most_ranks for alone in config.each))
