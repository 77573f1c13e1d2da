"""What the scripts share which load a model and generate with it: their arguments, and loading what these name.

torch is imported where it is used, which keeps --help and bad input fast.
"""

import argparse
from collections.abc import Callable
from dataclasses import fields
from functools import partial

from longqlora.cli import DTYPES, dtype_of
from longqlora.inference.generation import NO_TEMPLATE, GenerationOptions
from longqlora.inference.source import ModelSource, read_source
from longqlora.model.context_request import add_context_arguments, context_request
from longqlora.settings.config import PROMPT_TEMPLATES


def parse(
    description: str, *add_arguments: Callable[[argparse.ArgumentParser], None], epilog: str = ""
) -> argparse.Namespace:
    """The command line of a script that loads a model; each of `add_arguments` declares flags beside the model's."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=raw)
    for add in (add_model_arguments, *add_arguments):
        add(parser)
    args = parser.parse_args()
    if not args.model_name_or_path and not args.adapter_name_or_path:
        raise ValueError("--model_name_or_path: give a model, or --adapter_name_or_path with an adapter that names one")
    if args.context_size == -1:
        # So upstream's commands write the model's own context.
        args.context_size = None
    context_request(args)
    return args


def parse_generation(
    description: str, add_arguments: Callable[[argparse.ArgumentParser], None], *, template: str, epilog: str = ""
) -> tuple[argparse.Namespace, GenerationOptions]:
    """`parse` for a script that generates; template: as for `add_template_argument`."""
    add_template = partial(add_template_argument, template=template)
    args = parse(description, add_template, add_arguments, add_generation_arguments, epilog=epilog)
    try:
        return args, GenerationOptions(**{item.name: getattr(args, item.name) for item in fields(GenerationOptions)})
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that choose and load a model."""
    group = parser.add_argument_group("model")
    group.add_argument("--model_name_or_path", "--base_model", help="folder or hub name of a base or merged model "
                       "(default: the base that the adapter names)")  # fmt: skip
    group.add_argument("--adapter_name_or_path", "--peft_model", help="folder of a trained adapter")
    group.add_argument("--load_in_4bit", action=argparse.BooleanOptionalAction, default=False,
                       help="quantise the base to NF4, as in training (default: no)")  # fmt: skip
    group.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="that of the weights (default: auto)")
    group.add_argument("--device_map", choices=("auto",), help="auto: spread the layers over all GPUs of this machine "
                       "(default: one GPU for each process)")  # fmt: skip
    group.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add_context_arguments(parser)


def add_template_argument(parser: argparse.ArgumentParser, template: str = NO_TEMPLATE) -> None:
    """--prompt_template. template: what auto means where none is known; raw text is a choice where it is that."""
    is_raw = template == NO_TEMPLATE
    parser.add_argument(
        "--prompt_template", choices=("auto", *[NO_TEMPLATE] * is_raw, *PROMPT_TEMPLATES), default="auto",
        help=f"{'none is raw text; ' * is_raw}auto is the template the model was tuned with, as far as its run record "
        f"or tokenizer tell, and else {template} (default: auto)",
    )  # fmt: skip


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """--system, and one argument for each field of `GenerationOptions`."""
    parser.add_argument("--system", metavar="TEXT", help="system message (default: that of the template)")
    group = parser.add_argument_group("generation")
    kinds = {"do_sample": {"action": argparse.BooleanOptionalAction}, "seed": {"type": int},
             "stop": {"nargs": "+", "metavar": "TEXT"}}  # fmt: skip
    for item in fields(GenerationOptions):
        kind = kinds.get(item.name, {"type": item.type})
        group.add_argument(f"--{item.name}", default=item.default, help=item.metadata["help"], **kind)


def model_sources(args: argparse.Namespace) -> dict[str, str | None]:
    """What loading the model reads, for `longqlora.outputs`: the base that an adapter names is one of them."""
    base, adapter = args.model_name_or_path, args.adapter_name_or_path
    if not base:
        from longqlora.model.adapter_folder import base_model_of

        base = base_model_of(adapter)
    return {"--model_name_or_path": base, "--adapter_name_or_path": adapter}


def source_from_arguments(args: argparse.Namespace) -> ModelSource:
    """The model that `add_model_arguments` parsed, without its weights."""
    base, adapter, trust_remote_code = args.model_name_or_path, args.adapter_name_or_path, args.trust_remote_code
    return read_source(base, adapter, context_request(args), trust_remote_code=trust_remote_code)


def load_from_arguments(args: argparse.Namespace, source: ModelSource):
    """The longqlora.inference.load.LoadedModel of what `source_from_arguments` gave."""
    from longqlora.inference.load import load_weights

    options = {"load_in_4bit": args.load_in_4bit, "device_map": args.device_map}
    return load_weights(source, dtype=dtype_of(args.dtype), **options)
