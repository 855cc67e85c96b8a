"""The app that `benchmarks/serving.py bare` compares with: `ray.serve.llm` as its documentation has it, adapters from an object store, until SIGTERM.

    python benchmarks/bare_llm.py BASE s3://BUCKET/PREFIX PORT

The engine's arguments are those that the service gives to its own. A module of its own, because it is a process of its own.
"""

from __future__ import annotations

import signal
import sys
import threading

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

from translora_ray.cluster import Vllm
from translora_ray.engines.vllm import engine_arguments
from translora_ray.placement import cpus

MODEL = "base"


def main() -> None:
    base, adapters, port = sys.argv[1:]
    ray.init(address="local", num_cpus=cpus() + 1, include_dashboard=False, log_to_driver=False, logging_level="error")
    ending = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # after `ray.init`, which has a handler of its own
        signal.signal(number, lambda *_: ending.set())
    arguments = engine_arguments(base, (), Vllm(rank=16, adapters=8, cpu_cache_gib=1.0), 0)
    folder = arguments.pop("model")
    arguments.pop("distributed_executor_backend")
    config = LLMConfig(
        model_loading_config={"model_id": MODEL, "model_source": folder},
        engine_kwargs=arguments,
        lora_config={"dynamic_lora_loading_path": adapters, "max_num_adapters_per_replica": 8},
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundles": [{"CPU": 0}]},
        deployment_config={"num_replicas": 1, "ray_actor_options": {"num_cpus": cpus()}},
        runtime_env={"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}},
        log_engine_metrics=False,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    app = build_openai_app({"llm_configs": [config], "ingress_deployment_config": {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0}}})
    serve.run(app, name="bare", blocking=False)
    print("ready", flush=True)
    ending.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
