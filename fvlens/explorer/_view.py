"""The explorer's widgets: each event is one call of the session, and what changed is shown again."""

import functools
import html
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go

from fvlens.explorer._figures import bars, become, by_prompt, head_map
from fvlens.explorer._files import names
from fvlens.explorer._session import MOST_SCALE, Session
from fvlens.explorer._texts import attention_html, caption_html, compared_html, decoded_html, lens_html, vector_line
from fvlens.relations import list_relations, load_relation
from fvlens.types import Head

TYPED = "(type pairs)"
"""The choice that is no relation of the library."""

_WIDE = {"description_width": "initial"}
_ROW = widgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="6px")


class Explorer(widgets.VBox):
    """The widgets over a :class:`Session`; show it as the last line of a cell.

    Attributes:
        session: what they are a view of.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._quiet = False
        session.progress = self._progress
        self.said = widgets.HTML()
        self.wrong = widgets.HTML()
        self._make_pairs()
        self._make_map()
        self._make_head()
        self._make_prompt()
        self._make_files()
        self.body = widgets.VBox([])
        super().__init__([self.pairs_box, self.said, self.wrong, self.body])
        self.add_class("fvlens-explorer")
        self._all()

    # -- making -------------------------------------------------------------------------------------------------------

    def _make_pairs(self) -> None:
        self.relation = widgets.Dropdown(options=[*list_relations(), TYPED], description="relation")
        self.typed = widgets.Textarea(
            placeholder="hot, cold\nbig, small\n(20 pairs or more, one a line)",
            layout=widgets.Layout(width="320px", height="110px", display="none"),
        )
        self.find = widgets.Button(description="find its heads", button_style="primary")
        self.relation.observe(self._on(lambda change: self._show_typed()), "value")
        self.find.on_click(self._on(lambda button: self._find()))
        self.pairs_box = widgets.HBox([self.relation, self.typed, self.find], layout=_ROW)

    def _make_map(self) -> None:
        self.map = go.FigureWidget()
        self.caption, self.heads = widgets.HTML(), widgets.HTML()
        self.layer = widgets.IntSlider(0, 0, self.session.model.cfg.n_layers - 1, description="layer")
        self.scale = widgets.FloatSlider(1, min=-MOST_SCALE, max=MOST_SCALE, step=0.25, description="scale")
        for slider in (self.layer, self.scale):
            slider.layout.width = "360px"
        self.layer.observe(self._on(lambda change: self._move(layer=change["new"])), "value")
        self.scale.observe(self._on(lambda change: self._move(scale=change["new"])), "value")

    def _make_head(self) -> None:
        session = self.session
        cfg = session.model.cfg
        options = [(str(Head(i, j)), Head(i, j)) for i in range(cfg.n_layers) for j in range(cfg.n_heads)]
        self.head = widgets.Dropdown(options=options, description="head", layout=widgets.Layout(width="180px"))
        kinds = [("wrong labels", "corrupted"), ("true labels", "clean")]
        self.kind = widgets.ToggleButtons(options=kinds, style={"button_width": "120px"})
        self.prompt = widgets.Dropdown(description="prompt", layout=widgets.Layout(width="300px"))
        self.attention, self.note = widgets.HTML(), widgets.HTML()
        self.decoded = widgets.HTML(layout=widgets.Layout(width="200px"))
        self.lens = widgets.HTML(layout=widgets.Layout(width="340px"))
        self.by_prompt = go.FigureWidget()
        self.head.observe(self._on(lambda change: self._look(head=change["new"])), "value")
        self.kind.observe(self._on(lambda change: self._look(kind=change["new"])), "value")
        self.prompt.observe(self._on(lambda change: self._look(prompt=change["new"])), "value")

    def _make_prompt(self) -> None:
        self.text = widgets.Textarea(
            continuous_update=False, description="prompt", layout=widgets.Layout(width="420px", height="56px")
        )
        self.asked = widgets.Checkbox(
            description="ask it as a word, in the template", indent=False, layout=widgets.Layout(width="auto")
        )
        self.run = widgets.Button(description="ask")
        self.bars = go.FigureWidget()
        self.text.observe(self._on(lambda change: self._type()), "value")
        self.asked.observe(self._on(lambda change: self._type()), "value")
        self.run.on_click(self._on(lambda button: self._type()))

    def _make_files(self) -> None:
        self.name = widgets.Text(placeholder="name", description="name", layout=widgets.Layout(width="240px"))
        self.files = widgets.Dropdown(description="files", layout=widgets.Layout(width="240px"))
        self.compared = widgets.HTML()
        acts: dict[str, Callable[[], None]] = {
            "save vector": lambda: self._wrote(self.session.save_vector(self.name.value)),
            "save state": lambda: self._wrote(self.session.save_state(self.name.value)),
            "load": self._load,
            "keep beside": lambda: self._beside(self.session.keep_beside),
            "drop beside": lambda: self._beside(self.session.drop_beside),
        }
        self.buttons = {name: widgets.Button(description=name) for name in acts}
        for name, act in acts.items():
            self.buttons[name].on_click(self._on(lambda button, act=act: act()))

    # -- events -------------------------------------------------------------------------------------------------------

    def _on(self, act: Callable[[Any], None]) -> Callable[[Any], None]:
        """An event's function, which shows in words what went wrong, and is deaf while widgets are being set."""

        @functools.wraps(act)
        def called(*event: Any) -> None:
            if self._quiet:
                return
            try:
                act(event[0] if event else None)
            except Exception as error:
                self._say_wrong(error)
                self._values()
            else:
                self.wrong.value = ""

        return called

    def _say_wrong(self, error: Exception) -> None:
        words = " ".join(str(error).split()) or type(error).__name__
        said = words if isinstance(error, ValueError) else f"{type(error).__name__}: {words}"
        self.wrong.value = (
            '<div class="fvlens-error" role="alert" style="border-left:4px solid #B2182B;padding:4px 10px;'
            f'background:#fdf0ee;color:#222;line-height:1.4">{html.escape(said)}</div>'
        )

    def _progress(self, words: str) -> None:
        self.said.value = f'<i class="fvlens-working">working: {html.escape(words)} ...</i>'

    def _show_typed(self) -> None:
        self.typed.layout.display = None if self.relation.value == TYPED else "none"

    def _find(self) -> None:
        self.find.disabled = True
        try:
            if self.relation.value == TYPED:
                self.session.choose_typed(self.typed.value)
            else:
                self.session.choose(str(self.relation.value))
        finally:
            self.find.disabled = False
            self._summary()
        self._all()

    def _move(self, **where: Any) -> None:
        self.session.move(**where)
        self._show_bars()
        self._show_vector()

    def _look(self, **what: Any) -> None:
        self.session.look(**what)
        self._values()
        become(self.map, self._captioned())
        self._show_head()

    def _click(self, points: Any) -> None:
        if not points.xs:
            return
        self.session.toggle((round(points.ys[0]), round(points.xs[0])))
        self._values()
        become(self.map, self._captioned())
        self._show_bars()
        self._show_vector()
        self._show_head()

    def _type(self) -> None:
        self.session.type(self.text.value, asked=self.asked.value)
        self._show_bars()

    def _load(self) -> None:
        name = self.files.value
        if name is None:
            raise ValueError(f"there are no vectors or states in {self.session.folder} yet; save one first.")
        if name.endswith(".json"):
            try:
                self.session.load_state(name)
            finally:
                self._summary()
            self._all()
        else:
            self._beside(lambda: self.session.load_beside(name))

    def _beside(self, act: Callable[[], Any]) -> None:
        act()
        self._show_bars()
        self._show_vector()

    def _wrote(self, path: Any) -> None:
        self._list_files()
        self.said.value = f"<span>wrote {html.escape(str(path))}</span>"

    # -- showing ------------------------------------------------------------------------------------------------------

    def _all(self) -> None:
        """Show everything, after pairs were chosen or a state was loaded."""
        self._list_files()
        self._summary()
        if self.session.found is None:
            return
        self._show_pairs()
        self._values()
        self._show_text()
        self._draw("map", self._captioned(), lambda points: self._click(points))
        view = self.session.view()
        self._draw("by_prompt", by_prompt(self.session, view), lambda points: self._look(prompt=round(points.xs[0])))
        self._draw("bars", self._bars(), None)
        self._show_vector()
        self._show_head()
        self._place()

    def _place(self) -> None:
        left = [self.caption, self.map, self.heads, self.layer, self.scale, self.text]
        left += [widgets.HBox([self.asked, self.run], layout=_ROW), self.bars]
        choose = widgets.HBox([self.head, self.kind, self.prompt], layout=_ROW)
        beside = widgets.HBox([self.decoded, self.lens], layout=widgets.Layout(flex_flow="row wrap", grid_gap="24px"))
        right = [choose, widgets.HTML("<b>Attention from the last token</b>"), self.attention, self.by_prompt]
        right += [self.note, beside]
        files = [self.name, *(self.buttons[name] for name in ("save vector", "save state"))]
        files += [self.files, *(self.buttons[name] for name in ("load", "keep beside", "drop beside"))]
        column = {"width": "590px", "overflow": "visible"}
        self.body.children = [
            widgets.HBox(
                [widgets.VBox(left, layout=column), widgets.VBox(right, layout=column)],
                layout=widgets.Layout(flex_flow="row wrap", grid_gap="24px"),
            ),
            widgets.HBox(files, layout=_ROW),
            self.compared,
        ]

    def _draw(self, name: str, figure: go.Figure, click: Callable[[Any], None] | None) -> None:
        """A new figure, of which nothing old is left; clicks on its marks are told."""
        shown = go.FigureWidget(figure)
        shown._config = {**shown._config, "displayModeBar": False}
        setattr(self, name, shown)
        if click is not None:
            told = self._on(click)
            for trace in shown.data:
                trace.on_click(lambda trace, points, state: told(points))

    def _show_pairs(self) -> None:
        """Which relation it is; of pairs that are no library's, themselves."""
        relation = self.session.relation
        if relation is None:
            return
        is_known = relation.name in list_relations() and load_relation(relation.name).pairs == relation.pairs
        self.relation.value = relation.name if is_known else TYPED
        if not is_known:
            self.typed.value = "\n".join(", ".join(pair) for pair in relation.pairs)
        self._show_typed()

    def _show_text(self) -> None:
        """The session's prompt; what was typed and refused stays as it is instead, to be mended."""
        before, self._quiet = self._quiet, True
        try:
            self.text.value, self.asked.value = self.session.text, self.session.asked
        finally:
            self._quiet = before

    def _values(self) -> None:
        """Set the controls to what the session says, without hearing them."""
        session, before = self.session, self._quiet
        self._quiet = True
        try:
            self.layer.value, self.scale.value = session.layer, session.scale
            if session.found is None:
                return
            self.head.value, self.kind.value = session.head, session.kind
            questions = [(question, i) for i, question in enumerate(session.questions)]
            if list(self.prompt.options) != questions:
                self.prompt.options = questions
            self.prompt.value = session.prompt
        finally:
            self._quiet = before

    def _summary(self) -> None:
        found = self.session.found
        if found is None:
            self.said.value = "<i>Choose a relation, or type pairs, and find its heads.</i>"
            return
        self.said.value = f'<span class="fvlens-found">{html.escape(found._line())}</span>'

    def _list_files(self) -> None:
        folder = self.session.folder
        self.files.options = [f"{n}{end}" for end in (".json", ".safetensors") for n in names(folder, end)]

    def _captioned(self) -> go.Figure:
        figure = head_map(self.session)
        self.caption.value = caption_html(self.session, figure.layout.meta["note"])  # pyright: ignore
        return figure

    def _bars(self) -> go.Figure:
        session = self.session
        return bars(session.next_tokens(), list(session.columns), session.text.strip())

    def _show_bars(self) -> None:
        become(self.bars, self._bars())

    def _show_vector(self) -> None:
        self.heads.value = vector_line(self.session.vector)
        self.compared.value = compared_html(self.session)

    def _show_head(self) -> None:
        view = self.session.view()
        self.attention.value = attention_html(view.words, view.attention)
        self.decoded.value, self.lens.value = decoded_html(view), lens_html(self.session.lens(), self.session.prompt)
        self.note.value = html.escape(view.why_not)
        become(self.by_prompt, by_prompt(self.session, view))
