"""Command-line arguments that the scripts share which load a model and generate with it.

torch is imported where it is used, which keeps --help and bad input fast.
"""

import argparse

from longqlora.cli import DTYPES, dtype_of
from longqlora.data.prompt import prompt_template_for
from longqlora.inference.generation import NO_TEMPLATE, GenerationOptions, known_template
from longqlora.model.context_request import add_context_arguments, check_context_arguments, context_request
from longqlora.settings.config import PROMPT_TEMPLATES

TEMPLATE_NAMES = ("auto", NO_TEMPLATE, *PROMPT_TEMPLATES)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that choose and load a model, the same in every script that generates."""
    group = parser.add_argument_group("model")
    group.add_argument("--model_name_or_path", "--base_model", help="folder or hub name of a base or merged model "
                       "(default: the base that the adapter names)")  # fmt: skip
    group.add_argument("--adapter_name_or_path", "--peft_model", help="folder of a trained adapter")
    group.add_argument("--load_in_4bit", action=argparse.BooleanOptionalAction, default=False,
                       help="quantise the base to NF4, as in training (default: no)")  # fmt: skip
    group.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="dtype of the weights (default: auto)"
    )
    group.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add_context_arguments(parser)


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """One argument for each field of `GenerationOptions`."""
    default = GenerationOptions()
    group = parser.add_argument_group("generation")
    for name, kind, text in (
        ("max_new_tokens", int, "longest answer in tokens"),
        ("temperature", float, "0 means greedy"),
        ("top_p", float, "nucleus mass"),
        ("top_k", int, "most likely tokens to choose from, 0 for no limit"),
        ("repetition_penalty", float, "above 1 discourages repetition"),
    ):
        group.add_argument(
            f"--{name}", type=kind, default=getattr(default, name), help=f"{text} (default: %(default)s)"
        )
    group.add_argument("--do_sample", action=argparse.BooleanOptionalAction, default=default.do_sample,
                       help="sample, or take the most likely token (default: sample)")  # fmt: skip
    group.add_argument("--seed", type=int, help="makes every answer reproducible (default: none)")
    group.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="end the answer before any of these")


def add_conversation_arguments(parser: argparse.ArgumentParser) -> None:
    """What a chat needs to know of the model's training."""
    parser.add_argument("--prompt_template", choices=("auto", *PROMPT_TEMPLATES), default="auto",
                        help="auto is the template the model was tuned with, as far as its run record or tokenizer "
                        "tell, and else vicuna_v1.1 (default: auto)")  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="system message (default: that of the template)")


def text_template(args: argparse.Namespace, loaded) -> str:
    """The template that --prompt_template means for `loaded`, a longqlora.inference.load.LoadedModel.

    auto is the one that the model was tuned with, and `NO_TEMPLATE`, raw text, where none is known.
    """
    if args.prompt_template != "auto":
        return args.prompt_template
    folders = [args.adapter_name_or_path, loaded.base_model_name_or_path]
    return known_template(loaded.tokenizer, folders) or NO_TEMPLATE


def conversation_template(args: argparse.Namespace, loaded) -> str:
    """As `text_template`, with the default template where none is known."""
    template = text_template(args, loaded)
    return prompt_template_for(loaded.tokenizer, None if template == NO_TEMPLATE else template)


def generation_options(args: argparse.Namespace) -> GenerationOptions:
    """The options that `add_generation_arguments` parsed."""
    fields = {name: getattr(args, name) for name in GenerationOptions.__dataclass_fields__}
    return GenerationOptions(**{**fields, "stop": tuple(args.stop)})


def check_model_arguments(args: argparse.Namespace) -> None:
    """Refuse, before anything heavy is imported, what `add_model_arguments` cannot mean."""
    if not args.model_name_or_path and not args.adapter_name_or_path:
        raise ValueError("--model_name_or_path: give a model, or --adapter_name_or_path with an adapter that names one")
    check_context_arguments(args)


def model_sources(model_name_or_path: str | None, adapter_name_or_path: str | None) -> dict[str, str | None]:
    """What loading a model reads, for `longqlora.outputs`: the base that an adapter names is one of them."""
    if adapter_name_or_path and not model_name_or_path:
        from longqlora.model.adapter_folder import base_model_of

        model_name_or_path = base_model_of(adapter_name_or_path)
    return {"--model_name_or_path": model_name_or_path, "--adapter_name_or_path": adapter_name_or_path}


def config_from_arguments(args: argparse.Namespace):
    """The config of the model that `add_model_arguments` parsed, before its weights are read."""
    from longqlora.model.context import resolve_config

    name, adapter = args.model_name_or_path, args.adapter_name_or_path
    return resolve_config(name, adapter, context_request(args), trust_remote_code=args.trust_remote_code)[1]


def load_from_arguments(args: argparse.Namespace):
    """Load what `add_model_arguments` parsed; returns `longqlora.inference.load.LoadedModel`."""
    check_model_arguments(args)
    from longqlora.inference.load import load_for_inference

    return load_for_inference(
        args.model_name_or_path,
        adapter_name_or_path=args.adapter_name_or_path,
        context=context_request(args),
        load_in_4bit=args.load_in_4bit,
        dtype=dtype_of(args.dtype),
        trust_remote_code=args.trust_remote_code,
    )
