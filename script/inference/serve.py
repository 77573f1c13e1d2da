"""Serve a model behind an OpenAI-compatible endpoint, with vLLM where it is installed, else transformers' own server.

    python script/inference/serve.py --model_name_or_path output/merged --port 8000
    python script/inference/serve.py --model_name_or_path output/merged --server vllm -- --tensor-parallel-size 2
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "output/merged", "prompt": "Once upon a time", "max_tokens": 32}'

The process becomes the server's; words behind -- are its own flags. RoPE and context are those of config.json: vLLM is
told the length, transformers scales RoPE as the config says and has no other limit. An adapter is merged first.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from longqlora.cli import DTYPES, require_extra, run_main

SERVERS = {
    "vllm": ["-m", "vllm.entrypoints.cli.main", "serve"],
    "transformers": ["-c", "from transformers.cli.transformers import main; main()", "serve"],
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", "--base_model", required=True,
                        help="folder or hub name of a base or merged model")  # fmt: skip
    parser.add_argument("--server", choices=("auto", *SERVERS), default="auto", help="auto is vllm where it is "
                        "installed and reads the model's RoPE, else transformers (default: auto)")  # fmt: skip
    parser.add_argument("--host", default="localhost", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of the weights (default: auto)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument("server_flags", nargs="*", metavar="-- FLAG", help="flags of the server itself")
    return parser.parse_args()


def server_command(args: argparse.Namespace) -> list[str]:
    """The command line of the server. Raises ValueError for a model that it would compute otherwise than we do."""
    from longqlora.attention.dual_chunk_binding import dual_chunk_sizes
    from longqlora.model.base import load_tokenizer
    from longqlora.model.context import context_length, resolve_config, rope_of

    name = args.model_name_or_path
    if (Path(name) / "adapter_config.json").is_file():
        raise ValueError(
            f"--model_name_or_path: {name!r} is an adapter; merge it first: python script/merge_lora.py "
            f"--adapter_name_or_path {name} --save_path {name.rstrip('/')}-merged"
        )
    _, config = resolve_config(name, trust_remote_code=args.trust_remote_code)
    if dual_chunk_sizes(config):
        raise ValueError(
            f"--model_name_or_path: {name!r} reads with dual chunk attention, which the servers do not compute; use "
            "script/inference/web.py"
        )
    is_dynamic = rope_of(config).rope_parameters.get("rope_type") == "dynamic"
    server = args.server
    if server == "auto":
        server = "vllm" if importlib.util.find_spec("vllm") and not is_dynamic else "transformers"
    if server == "vllm" and is_dynamic:
        raise ValueError("--server vllm: has no angles for dynamic RoPE beyond its start; use --server transformers")
    if server == "vllm" and not importlib.util.find_spec("vllm"):
        raise ValueError("--server vllm: it is not installed; pip install vllm, or use --server transformers")
    for module in ("openai", "uvicorn", "fastapi") if server == "transformers" else ():
        require_extra(module, "transformers[serving]", extra="serve")
    dtype = DTYPES.get(args.dtype, "auto")
    flags = [name, "--host", args.host, "--port", str(args.port), "--dtype", dtype]
    flags += ["--trust-remote-code"] * args.trust_remote_code
    if server == "vllm":
        flags += ["--max-model-len", str(context_length(config))]
    host = f"[{args.host}]" if ":" in args.host else args.host
    address = f"http://{host}:{args.port}/v1"
    print(f"{server} serves {name} with {context_length(config)} tokens on {address}", flush=True)
    if not getattr(load_tokenizer(name, trust_remote_code=args.trust_remote_code), "chat_template", None):
        print("its tokenizer has no chat template: /v1/completions answers, /v1/chat/completions does not", flush=True)
    return [sys.executable, *SERVERS[server], *flags, *args.server_flags]


def main() -> None:
    command = server_command(parse_arguments())
    os.execv(command[0], command)


if __name__ == "__main__":
    run_main(main)
