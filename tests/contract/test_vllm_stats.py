"""What stats.py, startup.py and metrics.py take for granted of vLLM, at the pin.

Each of these fails on the vLLM that changed it, with the name that changed: that is what an upgrade
reads first.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import REGISTRY

from llm_worker import metrics
from llm_worker.metrics import ENDINGS, StatMetrics

pytestmark = pytest.mark.needs("vllm")


def fields(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_scheduler_stats_have_the_fields_that_are_recorded() -> None:
    """SchedulerStats, PrefixCacheStats and SchedulerIterationDetails."""
    from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerIterationDetails, SchedulerStats

    assert fields(SchedulerStats) >= {
        "num_running_reqs",
        "kv_cache_usage",
        "iteration_details",
        "prefix_cache_stats",
    }
    assert fields(PrefixCacheStats) >= {"preempted_requests", "preempted_queries", "preempted_hits"}
    assert fields(SchedulerIterationDetails) >= {
        "num_ctx_requests",
        "num_ctx_tokens",
        "num_generation_requests",
        "num_generation_tokens",
        "elapsed_ms",
        "is_dummy",
    }


def test_the_iteration_stats_have_the_fields_that_are_recorded() -> None:
    """IterationStats, PromptTokenStats and FinishedRequestStats."""
    from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, PromptTokenStats

    assert set(vars(IterationStats())) >= {
        "time_to_first_tokens_iter",
        "inter_token_latencies_iter",
        "num_generation_tokens",
        "prompt_token_stats",
        "finished_requests",
    }
    assert "computed" in fields(PromptTokenStats)
    assert fields(FinishedRequestStats) >= {
        "finish_reason",
        "e2e_latency",
        "decode_time",
        "mean_time_per_output_token",
        "num_generation_tokens",
    }


def test_every_finish_reason_is_an_ending() -> None:
    """A reason that vLLM adds shows here, not as "error" on someone's dashboard."""
    from vllm.v1.engine import FinishReason

    reasons = {str(reason) for reason in FinishReason}
    assert reasons == {reason for outcome, reason in ENDINGS if outcome == "finished"}


def test_the_admission_rejections_are_endings() -> None:
    """vLLM's own reasons for refusing a request, by the same names."""
    from vllm.v1.metrics.loggers import ADMISSION_REASONS

    rejected = {reason for outcome, reason in ENDINGS if outcome == "rejected"}
    assert rejected == {*ADMISSION_REASONS, "invalid"}


def test_errors_are_told_apart_by_classes_that_do_not_overlap_the_wrong_way() -> None:
    """Admission errors are graceful, validation errors the client's, a dead engine is neither."""
    from vllm.exceptions import (
        GracefulHTTPError,
        MaxQueuedTokensError,
        QueueOverflowError,
        VLLMClientError,
        VLLMValidationError,
    )
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    assert issubclass(QueueOverflowError, GracefulHTTPError)
    assert issubclass(MaxQueuedTokensError, GracefulHTTPError)
    assert issubclass(VLLMValidationError, VLLMClientError)
    for error in (EngineDeadError, EngineGenerateError):
        assert not issubclass(error, (GracefulHTTPError, VLLMClientError))


def test_a_stat_logger_is_built_and_called_as_ours_expect() -> None:
    """Aggregate classes get engine_indexes, by keyword; record gets engine_idx."""
    from vllm.v1.metrics.loggers import AggregateStatLoggerBase, StatLoggerBase, StatLoggerManager

    from llm_worker.serving import stat_logger as stats

    assert parameters(AggregateStatLoggerBase.__init__) == ["self", "vllm_config", "engine_indexes"]
    for ours in (stats.StatLogger, stats.PluginStatLogger):
        assert parameters(ours.record) == parameters(StatLoggerBase.record)
        assert not getattr(ours, "__abstractmethods__", None)
        for name, method in inspect.getmembers(AggregateStatLoggerBase, inspect.isfunction):
            if not name.startswith("_") and name not in ("record", "log"):
                assert len(parameters(getattr(ours, name))) == len(parameters(method)), name
    source = inspect.getsource(StatLoggerManager.__init__)
    assert re.search(r"vllm_config=vllm_config,\s+engine_indexes=self\.engine_indexes", source)


def test_the_plugin_is_a_class_that_vllm_accepts() -> None:
    """Found through the installed entry point; vLLM refuses to start on anything else."""
    from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories

    from llm_worker.serving.stat_logger import PluginStatLogger

    assert PluginStatLogger in load_stat_logger_plugin_factories()


def test_generate_and_encode_are_async_generators_that_take_an_adapter() -> None:
    """The ledger wraps both and finds the adapter by keyword, or fourth in encode."""
    from vllm.v1.engine.async_llm import AsyncLLM

    for name in ("generate", "encode"):
        method = inspect.unwrap(getattr(AsyncLLM, name))
        assert inspect.isasyncgenfunction(method)
    generate = inspect.signature(inspect.unwrap(AsyncLLM.generate)).parameters
    assert generate["lora_request"].kind is inspect.Parameter.KEYWORD_ONLY
    encode = parameters(inspect.unwrap(AsyncLLM.encode))
    assert encode[:5] == ["self", "prompt", "pooling_params", "request_id", "lora_request"]


def test_outputs_say_that_they_finished_and_why() -> None:
    """What the ledger looks at when a request is over."""
    from vllm.lora.request import LoRARequest
    from vllm.outputs import CompletionOutput, PoolingRequestOutput, RequestOutput

    assert "finish_reason" in fields(CompletionOutput)
    assert "finished" in parameters(RequestOutput.__init__)
    assert "finished" in parameters(PoolingRequestOutput.__init__)
    assert "lora_name" in getattr(LoRARequest, "__annotations__", {})


def test_vllm_keeps_our_metrics_when_it_clears_its_own() -> None:
    """It unregisters collectors whose name starts with vllm: from the default registry."""
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    ours = StatMetrics(REGISTRY)
    try:
        unregister_vllm_metrics()
        assert ours.engine_steps_total in REGISTRY._collector_to_names
    finally:
        for collector in list(REGISTRY._collector_to_names):
            if getattr(collector, "_name", "").startswith(metrics.PREFIX):
                REGISTRY.unregister(collector)


def test_latency_and_token_buckets_are_vllms() -> None:
    """Our histograms can be laid over vLLM's; zero is ours."""
    from vllm.v1.metrics.buckets import ITERATION_TOKENS_BUCKETS, TIME_TO_FIRST_TOKEN_BUCKETS

    assert metrics.LATENCY_BUCKETS == TIME_TO_FIRST_TOKEN_BUCKETS
    assert (0, *ITERATION_TOKENS_BUCKETS) == metrics.TOKEN_BUCKETS


def test_the_configuration_has_the_names_that_capacity_and_limits_are_read_from() -> None:
    """Fields of the config classes; those set after start-up are declared there too."""
    from vllm.config import (
        CacheConfig,
        ModelConfig,
        ParallelConfig,
        SchedulerConfig,
        VllmConfig,
    )

    assert fields(CacheConfig) >= {
        "num_gpu_blocks",
        "block_size",
        "kv_cache_size_tokens",
        "effective_attention_block_size",
    }
    assert fields(SchedulerConfig) >= {"max_num_seqs", "max_num_batched_tokens"}
    assert fields(VllmConfig) >= {"instance_id"}
    assert fields(ParallelConfig) >= {
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
        "data_parallel_index",
        "data_parallel_rank_local",
        "data_parallel_size_local",
    }
    assert isinstance(inspect.getattr_static(ParallelConfig, "local_engines_only"), property)
    assert {"served_model_name", "max_model_len"} <= fields(ModelConfig)
    assert "self.runner_type = " in inspect.getsource(ModelConfig)  # set after validation


def test_blocks_of_all_ranks_are_added_up_and_one_per_rank_is_the_null_block() -> None:
    """Why capacity divides, and why it subtracts one."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.engine.core_client import MPClient

    apply = inspect.getsource(inspect.unwrap(MPClient._apply_ready_response))
    assert "num_gpu_blocks += response.num_gpu_blocks" in apply
    usage = inspect.getsource(BlockPool.get_usage)
    assert "self.num_gpu_blocks - 1" in usage
    assert "1.0 - (self.get_num_free_blocks() / total_gpu_blocks)" in usage


def test_every_start_up_hook_has_its_method() -> None:
    """Without one the facts, or the KV cache's truth, would be unknown, silently."""
    import importlib

    from llm_worker.serving import core_truth as truth
    from llm_worker.serving import hooks as startup

    for module, owner, method, _ in startup._HOOKS:
        cls = getattr(importlib.import_module(module), owner)
        if method == truth.METHOD:  # ours; vLLM has none of that name
            continue
        if (owner, method) == ("WorkerWrapperBase", "load_model"):
            # Not its own: reached through __getattr__, which the hook stands in for.
            from vllm.v1.worker.worker_base import WorkerBase

            assert callable(WorkerBase.load_model)
            assert "getattr(self.worker, attr)" in inspect.getsource(cls.__getattr__)
        else:
            assert callable(getattr(cls, method)), method


def test_the_ready_message_is_decoded_without_regard_to_a_field_it_does_not_know() -> None:
    """Our facts ride in it as one more field; an API process without this package ignores them."""
    import msgspec
    from vllm.v1.engine import EngineCoreReadyResponse

    assert fields(EngineCoreReadyResponse) >= {"data_parallel_rank", "num_gpu_blocks"}
    examples: dict[Any, Any] = {int: 1, str: "x", bool: False}
    required = {
        field.name: examples.get(field.type)
        for field in dataclasses.fields(EngineCoreReadyResponse)
        if field.default is dataclasses.MISSING
    }
    payload = msgspec.msgpack.encode(required | {"llm_worker_facts": {"kv_bytes": 1}})
    decoded = msgspec.msgpack.decode(payload, type=EngineCoreReadyResponse)
    assert decoded.num_gpu_blocks == 1


def test_a_kv_tensor_names_the_size_of_its_whole_allocation() -> None:
    """Bytes of the cache are the largest such size, not their sum."""
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor

    assert fields(KVCacheTensor) >= {"size", "host_resident"}
    assert "kv_cache_tensors" in fields(KVCacheConfig)
    assert "total size of the backing allocation" in inspect.getsource(KVCacheTensor)


# Routes that take a POST and are no request for the model: they render, count, or steer the server.
NO_INFERENCE = re.compile(
    r"/(render|derender|count_tokens|cancel|abort_requests|tokenize|detokenize|ping)$"
    r"|scale_elastic_ep$|scaling_elastic_ep$"
)
# vLLM includes these only for models of their kind.
OF_SOME_MODELS = (
    "vllm.entrypoints.pooling.pooling.api_router",
    "vllm.entrypoints.pooling.classify.api_router",
    "vllm.entrypoints.pooling.embed.api_router",
    "vllm.entrypoints.pooling.scoring.api_router",
)


def posts(routes: Any) -> Iterator[str]:
    """The paths that take a POST, also of what is mounted."""
    for route in routes:
        if "POST" in (getattr(route, "methods", None) or ()):
            yield route.path
        else:
            yield from posts(getattr(route, "routes", None) or ())


@pytest.fixture
def _root_logger() -> Iterator[None]:
    """vLLM's application sets its level, to the end of the process."""
    level = logging.root.level
    yield
    logging.root.setLevel(level)


@pytest.mark.usefixtures("_root_logger")
def test_every_route_that_asks_the_model_is_in_the_ledgers_list() -> None:
    """What vLLM refuses on a route that is not in the list would be in no account."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.tasks import FRONTEND_TASKS, GENERATION_TASKS, POOLING_TASKS
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from llm_worker.serving.ledger import INFERENCE

    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    app = build_app(args, (*FRONTEND_TASKS, *GENERATION_TASKS, *POOLING_TASKS), None)
    found = set(posts(app.routes))
    for module in OF_SOME_MODELS:
        found |= set(posts(importlib.import_module(module).router.routes))
    assert len(found) > 25
    # Cohere's router is made for a model that names it.
    assert {path for path in found if not NO_INFERENCE.search(path)} == INFERENCE - {
        "/cohere/v2/chat"
    }


def test_no_option_of_vllms_is_taken_for_one_of_ours() -> None:
    """Those that begin like ours are known, and pass through."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from llm_worker.settings.vllm_arguments import THEIRS
    from llm_worker.settings.worker import FLAG_PREFIX, load

    parser = make_arg_parser(FlexibleArgumentParser())
    options = {option for action in parser._actions for option in action.option_strings}
    assert {option for option in options if option.startswith(FLAG_PREFIX)} == THEIRS
    assert not options & {"--check-config", "--dump-config-to"}
    for option in THEIRS:
        asked = ["--model", "m", option, "x", f"{option}=y", option.replace("-", "_")]
        # The word before the first hyphen is the prefix's; vLLM takes underscores in the rest.
        assert list(load(asked, {}).config.engine_args) == asked[2:]


def test_admission_is_asked_before_generate_and_its_reason_told_at_once() -> None:
    """What `ledger.note_rejection` relies on: the reason comes within the request's own task."""
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.v1.engine.async_llm import AsyncLLM

    assert "check_admission" in inspect.getsource(GenerateBaseServing._preflight)
    assert not inspect.iscoroutinefunction(AsyncLLM.check_admission)
    assert "record_admission_rejection" in inspect.getsource(AsyncLLM._record_admission_rejection)


def test_the_coordinator_of_ranks_is_sent_a_function_of_ours_that_runs_vllms() -> None:
    """It loads no plug-in; started by spawning, by its name, or by forking, as it is here."""
    import pickle

    from vllm.v1.engine.coordinator import DPCoordinatorProc

    from llm_worker.serving import hooks as startup

    startup.install()
    assert pickle.loads(pickle.dumps(DPCoordinatorProc.run_coordinator)) is startup.run_coordinator
    with pytest.raises(TypeError, match="engine_count"):  # vLLM's own misses its arguments
        DPCoordinatorProc.run_coordinator()
