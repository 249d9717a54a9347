"""The studio's page, on Gradio: a prompt, the text with and without the switches, and what to click.

Annotations are evaluated here: by that of `click`, Gradio knows that it wants the event.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moestro.steer.generation import generate, prompt_ids
from moestro.steer.steering import Steering
from moestro.studio import panels
from moestro.studio.session import Switches, Trace, pieces, trace

INTRODUCTION = (
    "Write a prompt and generate. The map shows which expert each token took in every layer; click a token to see all "
    "of its experts. Click an expert or a head to switch it **off** (×), again to **boost** it (▲), again to leave it "
    "as it is; then generate again and compare."
)
CHANGED = {"token": (0, 1), "expert": (1, 2), "head": (3,)}
"""Which panels (see `Page.panels`) a click on something changes: large ones take a browser a while."""
NO_TRACE = "<p>Generate a text to see how it was computed.</p>"


class Page:
    """What the page's events do. The model is one for all who look: its events run one at a time."""

    def __init__(self, view: Any, base: Steering | None = None):
        self.view, self.base = view, base
        self.files = tempfile.TemporaryDirectory(prefix="moestro-studio-")
        self.experts = {layer.index: layer.num_experts for layer in view.layers}
        try:
            self.heads = view.num_heads
        except ValueError:
            self.heads = {}

    def steered(self, switches: Switches) -> bool:
        return bool(switches) or self.base is not None

    def write(
        self, prompt: str, tokens: float, temperature: float, seed: float, chat: bool, switches: Switches
    ) -> Iterator[tuple[str, str]]:
        """(text as it is, steered text) as they are made."""
        settings: dict[str, Any] = dict(
            max_new_tokens=int(tokens), temperature=temperature, seed=int(seed), chat=chat and None
        )

        def run(edits: list[Any], setups: list[Steering]) -> Iterator[str]:
            return pieces(
                lambda on_text, stop: generate(
                    self.view, prompt, edits=edits, steering=setups, on_text=on_text, stop=stop, **settings
                )
            )

        plain = steered = ""
        for plain in run([], []):
            yield plain, ""
        if self.steered(switches):
            for steered in run(switches.edits(), [self.base] if self.base else []):
                yield plain, steered
        yield plain, steered

    def trace(self, prompt: str, text: str, chat: bool, switches: Switches | None) -> Trace | None:
        """How prompt and text are computed, under the switches where they are given."""
        if not prompt.strip():
            return None
        ids = prompt_ids(self.view, prompt, chat=chat and None)
        made = self.view.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        whole = torch.cat([ids, made.to(ids)], dim=1)
        edits = [] if switches is None else [*(self.base.build() if self.base else []), *switches.edits()]
        return trace(self.view, whole, ids.shape[1], edits=edits)

    def panels(self, shown: Trace | None, chosen: int | None, switches: Switches) -> tuple[str, str, str, str]:
        """The map, the chosen token, the grid of experts, the grid of heads."""
        map_, detail = NO_TRACE, ""
        if shown is not None:
            map_ = panels.token_map(shown, chosen)
            last = len(shown.tokens) - 1
            detail = panels.token_detail(shown, last if chosen is None else min(chosen, last), switches.experts)
        experts = panels.switch_grid("expert", self.experts, switches.experts, shown.counts if shown else None)
        heads = panels.switch_grid("head", self.heads, switches.heads, shown.heads if shown else None)
        return map_, detail, experts, heads if self.heads else "<p>This model's heads cannot be reached.</p>"

    def click(self, pick: str, switches: Switches, chosen: int | None) -> tuple[Switches, int | None]:
        """The switches and the chosen token after a click. Raises ValueError where too few experts would be left."""
        unit, *numbers = pick.split(":")
        if unit == "token":
            return switches, int(numbers[0])
        layer, number = map(int, numbers)
        new = switches.clicked("head" if unit == "head" else "expert", (layer, number))
        with self.view.edits(*new.edits()):  # checks them
            pass
        return new, chosen

    def save(self, switches: Switches) -> str:
        """The path of the steering file. Raises ValueError where nothing is switched."""
        if not self.steered(switches):
            raise ValueError("nothing is switched: click an expert or a head first")
        return str(
            switches.steering(self.view, self.base).save(Path(tempfile.mkdtemp(dir=self.files.name)) / "steering.json")
        )


def told(switches: Switches, base: Steering | None) -> str:
    """What is switched, in words."""
    lines = switches.describe()
    if base is not None:
        lines.insert(0, f"the steering file's {len(base.edits)} edits")
    return "\n".join(f"- {line}" for line in lines) or "Nothing is switched."


def build(view: Any, name: str, base: Steering | None = None) -> Any:
    """The page as `gradio.Blocks`. Raises ImportError where Gradio is not installed, ValueError for a wrong file."""
    try:
        import gradio as gr
    except ImportError:
        raise ImportError("the studio needs Gradio: pip install 'moestro[studio]'") from None
    if base is not None:
        base.check(view)
    page = Page(view, base)
    has_chat = bool(getattr(view.tokenizer, "chat_template", None))
    one_at_a_time: dict[str, Any] = dict(concurrency_id="model", concurrency_limit=1)
    with gr.Blocks(title=f"moestro studio: {name}", analytics_enabled=False, fill_width=True) as app:
        switches, chosen, shown = gr.State(Switches()), gr.State(None), gr.State(None)
        gr.Markdown(f"## {name}\n{INTRODUCTION}")
        with gr.Row():
            prompt = gr.Textbox(label="prompt", lines=3, scale=4, elem_id="prompt")
            with gr.Column(scale=2, min_width=220):
                with gr.Row():
                    tokens = gr.Number(60, label="new tokens", minimum=1, maximum=2000, precision=0, min_width=80)
                    temperature = gr.Number(0, label="temperature", minimum=0, maximum=5, min_width=80)
                    seed = gr.Number(0, label="seed", precision=0, min_width=80)
                chat = gr.Checkbox(has_chat, label="chat template", visible=has_chat)
                with gr.Row():
                    go = gr.Button("generate", variant="primary", elem_id="generate")
                    stop = gr.Button("stop")
        with gr.Row():
            plain = gr.Textbox(label="as it is", lines=6, elem_id="plain", buttons=["copy"])
            steered = gr.Textbox(label="with the switches", lines=6, elem_id="steered", buttons=["copy"])
        with gr.Row():
            with gr.Column(scale=3):
                which = gr.Radio(["as it is", "with the switches"], value="as it is", label="the map is of the text")
                map_ = gr.HTML(NO_TRACE, js_on_load=panels.PICK, elem_id="map", elem_classes="panel")
            with gr.Column(scale=2):
                summary = gr.Markdown(told(Switches(), base), elem_id="summary")
                with gr.Row():
                    clear = gr.Button("leave all as it is")
                    save = gr.Button("save steering file", elem_id="save")
                    file = gr.DownloadButton(visible="hidden", elem_id="file")
                detail = gr.HTML(js_on_load=panels.PICK, elem_id="detail", elem_classes="panel")
        start = page.panels(None, None, Switches())
        gr.Markdown("### Experts\nOne row a layer, one cell an expert; the stronger its colour, the more tokens.")
        experts = gr.HTML(start[2], js_on_load=panels.PICK, elem_id="experts", elem_classes="panel")
        gr.Markdown("### Attention heads\nThe stronger its colour, the larger what the head gives.")
        heads = gr.HTML(start[3], js_on_load=panels.PICK, elem_id="heads", elem_classes="panel")
        pictures = [map_, detail, experts, heads]

        def write(*settings: Any) -> Iterator[tuple[str, str]]:
            with _told_to_the_user(gr):
                yield from page.write(*settings)

        def look(*given: Any) -> tuple[Any, ...]:
            text, other, which_one, asked, with_chat, now = given
            use = which_one != "as it is" and page.steered(now)
            with _told_to_the_user(gr):
                found = page.trace(asked, other if use else text, with_chat, now if use else None)
                return found, None, *page.panels(found, None, now)

        def click(event: gr.EventData, now: Switches, token: int | None, found: Trace | None) -> tuple[Any, ...]:
            with _told_to_the_user(gr):
                new, token = page.click(event.pick, now, token)
                changed = CHANGED[event.pick.partition(":")[0]]
                drawn = (p if i in changed else gr.skip() for i, p in enumerate(page.panels(found, token, new)))
                return new, token, told(new, base), *drawn

        def reset(token: int | None, found: Trace | None) -> tuple[Any, ...]:
            return Switches(), told(Switches(), base), *page.panels(found, token, Switches())

        def write_file(now: Switches) -> str:
            with _told_to_the_user(gr):
                return page.save(now)

        settings = [prompt, tokens, temperature, seed, chat, switches]
        looked: dict[str, Any] = dict(
            fn=look,
            inputs=[plain, steered, which, prompt, chat, switches],
            outputs=[shown, chosen, *pictures],
            **one_at_a_time,
        )
        running = gr.on([go.click, prompt.submit], write, settings, [plain, steered], **one_at_a_time)
        running.then(**looked)
        stop.click(None, cancels=[running])
        which.change(**looked)
        clicked = dict(
            fn=click, inputs=[switches, chosen, shown], outputs=[switches, chosen, summary, *pictures], **one_at_a_time
        )
        for panel in pictures:
            panel.select(**clicked)
        clear.click(reset, [chosen, shown], [switches, summary, *pictures])
        written = save.click(write_file, switches, file, **one_at_a_time)
        written.success(None, js="() => document.querySelector('#file').click()")
    return app


class _told_to_the_user:
    """Errors that a user can mend are shown on the page."""

    def __init__(self, gr: Any):
        self.gr = gr

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, ValueError):
            raise self.gr.Error(str(error), print_exception=False) from error


def launch(view: Any, name: str, base: Steering | None = None, **options: Any) -> Any:
    """Serve the page, at 127.0.0.1 unless told otherwise; nothing is asked of any other machine."""
    app = build(view, name, base)
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    defaults: dict[str, Any] = dict(server_name="127.0.0.1", share=False, theme=theme, css=panels.CSS, footer_links=[])
    return app.queue().launch(**defaults | options)
