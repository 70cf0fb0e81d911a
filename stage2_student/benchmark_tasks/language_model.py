"""The model that lm-eval talks to: `tide`, a block-diffusion student that generates.

Registered under the name `tide` when this module is imported, so that
`lm_eval.simple_evaluate(model="tide", model_args={"pretrained": FOLDER}, ...)` works too. lm-eval
makes it through one of two constructors (a text of arguments, or a mapping); both come here with
the command line's defaults beside them, and the arguments win.

Only generation is answered. A likelihood of a text under a diffusion model is a bound that needs
many forwards; `tide-eval` has no use for it, and a wrong number would look like a right one.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from stage2_student.benchmark_tasks.answer_journal import Answer, AnswerJournal, answer_key
from stage2_student.benchmark_tasks.chat_text import cut_answer, render
from stage2_student.benchmark_tasks.engines import Engine, open_engine
from stage2_student.benchmark_tasks.model_folder import find_model_folder, load_tokenizer
from stage2_student.sampling.settings import GenerationSettings
from tide_cache.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ARGUMENTS = {
    "pretrained": None,
    "revision": None,
    "device": "auto",
    "dtype": "auto",
    "batch_size": 1,
    "max_batch_size": None,
    "max_new_tokens": 256,
    "num_steps": None,
    "block_size": 32,
    "temperature": 0.0,
    "cfg_scale": 0.0,
    "threshold": None,
    "seed": 0,
    "think_block": True,
}


class AnswerProgress(Protocol):
    """What the model tells of its progress."""

    def start(self, num_kept: int, num_prompts: int) -> None:
        """Say how many prompts there are, and how many are answered already."""

    def update(self, num_answered: int) -> None:
        """Say how far it is."""


@register_model("tide")
class TideLM(LM):  # type: ignore[misc]
    """A block-diffusion student behind lm-eval's interface."""

    def __init__(
        self,
        *,
        tokenizer: "PreTrainedTokenizerBase",
        engine: Engine,
        settings: GenerationSettings,
        batch_size: int = 1,
        think_block: bool = True,
        journal: AnswerJournal | None = None,
        journal_context: Mapping[str, object] | None = None,
        progress: AnswerProgress | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._engine = engine
        self._settings = settings
        self._think_block = think_block
        self._journal = AnswerJournal(None) if journal is None else journal
        self._context = dict(journal_context or {})
        self._progress = progress
        self.answers: list[Answer] = []

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "TideLM":
        """Make it from `pretrained=FOLDER,threshold=0.9,...`."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "TideLM":
        """Make it from a mapping of arguments. Raises ConfigError on one that it does not know."""
        given = {k: v for k, v in (additional_config or {}).items() if v is not None} | arg_dict
        for name in given:
            if name not in _ARGUMENTS:
                raise ConfigError(
                    f"model_args: no argument {name!r}{did_you_mean(name, _ARGUMENTS)}",
                    hint=f"known: {', '.join(_ARGUMENTS)}",
                )
        return cls._from_arguments(_ARGUMENTS | given)

    @classmethod
    def _from_arguments(cls, values: dict[str, Any]) -> "TideLM":
        if values["pretrained"] is None:
            raise ConfigError("model_args: expected pretrained=FOLDER or a hub name")
        fields = ("max_new_tokens", "num_steps", "block_size", "temperature", "cfg_scale")
        settings = GenerationSettings(
            **{name: values[name] for name in (*fields, "threshold", "seed")}
        )
        folder = find_model_folder(str(values["pretrained"]), values["revision"])
        devices = str(values["device"]).split("+")
        return cls(
            tokenizer=load_tokenizer(folder),
            engine=open_engine(folder, devices, values["dtype"]),
            settings=settings,
            batch_size=int(values["batch_size"]),
            think_block=bool(values["think_block"]),
        )

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the keys of lm-eval's request cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the chat template's text, for lm-eval's log of a run."""
        return str(self.tokenizer.chat_template) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt's text, the empty think block included."""
        return render(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            think_block=self._think_block,
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer each request's prompt and cut the answer at the request's stop strings.

        Tokens, steps and temperature are the model's settings, whatever a task suggests. A prompt
        whose answer is in the journal is not generated anew.
        """
        prompts = [request.args[0] for request in requests]
        keys = [answer_key(self._context, prompt) for prompt in prompts]
        self._answer_missing(dict(zip(keys, prompts, strict=True)))
        self.answers = [self._kept(key) for key in keys]
        stops = [_stop_strings(request.args[1]) for request in requests]
        return [
            cut_answer(answer.text, until)
            for answer, until in zip(self.answers, stops, strict=True)
        ]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Refuse: see the module's text."""
        raise _generates_only("loglikelihood")

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Refuse: see the module's text."""
        raise _generates_only("loglikelihood_rolling")

    def close(self) -> None:
        """Let go of the device."""
        self._engine.close()

    def _kept(self, key: str) -> Answer:
        answer = self._journal.get(key)
        assert answer is not None, "an engine left a prompt without an answer"
        return answer

    def _answer_missing(self, wanted: Mapping[str, str]) -> None:
        missing = [key for key in wanted if self._journal.get(key) is None]
        if self._progress is not None:
            self._progress.start(len(wanted) - len(missing), len(wanted))
        if not missing:
            return
        prompts = [self._encode(wanted[key]) for key in missing]
        with closing(self._engine.generate(prompts, self._settings, self.batch_size)) as found:
            for batch in found:
                self._journal.add(
                    Answer(
                        key=missing[index],
                        text=self._decode(generation.text_ids),
                        num_new_tokens=len(generation.ids),
                        num_forwards=generation.num_forwards,
                    )
                    for index, generation in batch
                )
                if self._progress is not None:
                    self._progress.update(len(batch))

    def _encode(self, prompt: str) -> list[int]:
        # The chat template has written every special token that belongs there.
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids

    def _decode(self, ids: Iterable[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def _stop_strings(arguments: Mapping[str, Any]) -> Sequence[str]:
    until = arguments.get("until") or []
    return [until] if isinstance(until, str) else until


def _generates_only(method: str) -> ConfigError:
    return ConfigError(
        f"{method}: a block-diffusion student generates; it has no likelihood of a given text",
        hint="choose tasks whose output_type is generate_until, such as hellaswag_gen",
    )
