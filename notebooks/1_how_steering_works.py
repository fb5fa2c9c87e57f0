# /// script
# [tool.marimo.opengraph]
# title = "1 How steering works"
# description = "Add a direction, project it out or cap it: two vectors to drag, then a model."
# ///
"""How steering works: from two vectors you drag to a model you steer.

marimo edit notebooks/1_how_steering_works.py
python notebooks/1_how_steering_works.py -- --results results/smollm2-demo-smollm2-135m
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="1. How steering works", html_head_file="offline.html")

with app.setup:
    from pathlib import Path

    import marimo as mo

    from jaxsteer.data.wheels import use_compile_cache
    from jaxsteer.evidence import lesson
    from jaxsteer.evidence.charts import marks, opening, steering

    marks.use()
    use_compile_cache()
    ROOT = Path(__file__).resolve().parent.parent
    PAGE = "1_how_steering_works.py"
    # What works in an exported page.
    ALIVE = "the vectors of sections 1 to 5 and the menus of the last chart"


@app.cell
def _():
    results = opening.results_menu(ROOT)
    mo.vstack([mo.md("# How steering works"), results])
    return (results,)


@app.cell
def _(results):
    _named = results.value != opening.DEFAULT or (ROOT / results.value).is_dir()
    _head = opening.head(ROOT, PAGE, results.value, alive=ALIVE) if _named else None
    folder = ROOT / results.value if _named else None
    _head  # noqa: B018
    return (folder,)


@app.cell(hide_code=True)
def _():
    def _section(text, *steps, **fields):
        return opening.beside(mo.ui.anywidget(steering.plane(*steps, **fields)), mo.md(text))

    _intro = r"""
    For every token a language model keeps one long vector, the **residual stream**. Every layer
    *adds* to it, $h_{\ell+1} = h_\ell + \text{attention}_\ell(h_\ell, \ldots) +
    \text{mlp}_\ell(\ldots)$, and at the end it becomes the probabilities of the next token. To
    **steer** is to change this vector at some layer: first in two dimensions, then in a model.
    """
    _source = r"""
    ## 1. Where a direction comes from

    Read prompts with a property (squares: harmful ones, say) and without it (circles). The
    **direction** is the difference of the two means, $d = m_+ - m_-$, and $u = d / \lVert d \rVert$
    is its unit vector. **Drag the means** (or focus one and use the arrow keys).

    Short strokes are the projections $u \cdot h$; the dotted line is the middle between the means.
    Where the clouds overlap there is still a $d$, but few points are on their own side.
    """
    _add = r"""
    ## 2. Add: $h' = h + \alpha d$

    **Drag the tips** of $h$ and $d$, and move $\alpha$. The projection changes by
    $\alpha \lVert d \rVert$ for *every* $h$. The part of $h$ perpendicular to $d$ does not change.
    Adding does not turn a state "towards the persona": it moves all states by the same vector.
    """
    _project = r"""
    ## 3. Project out: $h' = h - (u \cdot h)\, u = (I - u u^\top)\, h$

    The projection becomes zero, whatever the length and the sign of $d$. Twice is the same as
    once, and it cannot be undone from $h'$ alone. In $D$ dimensions a *random* direction holds
    about $1/D$ of the squared length, so removing one changes little: a fair control must remove
    as much.
    """
    _cap = r"""
    ## 4. Cap: $h' = h + (\text{clip}(u \cdot h, -b, b) - u \cdot h)\, u$

    **Move $h$ in and out of the band.** Inside, a state stays as it is, bit for bit. Outside, its
    projection is clipped to the bound. With $b = 0$ this is projecting out.
    """
    _cancel = r"""
    ## 5. Add, then project out at the same place: it cancels

    Two paths, with the addition (orange, then green) and without it (grey); a small gap keeps them
    apart. **Move the strength**: the end point stays.

    $$(I - u u^\top)(h + \alpha d) = (I - u u^\top) h + \alpha \underbrace{(I - u u^\top) d}_{=0}$$

    "The persona was added at layer 20; when it was projected out *at layer 20*, refusal came back"
    says nothing about the model: by algebra it was never steered. jaxsteer marks such conditions
    `cancels_steering`, and runs every knockout without steering too, as its control.
    """
    _sections = [
        _section(_source, h=(1.4, 1.2), d=(-1.2, -0.6), cloud=lesson.cloud().tolist()),
        _section(_add, "add", h=(-1.0, 2.0), d=(1.5, 0.5)),
        _section(_project, "project", h=(1.5, 2.5), d=(2.0, 0.5)),
        _section(_cap, "cap", h=(2.5, 1.5), d=(1.5, 0.0)),
        _section(_cancel, "add", "project", h=(-1.5, 2.0), d=(1.5, -0.25), strength=2.5),
    ]
    mo.vstack([mo.md(_intro), *_sections])
    return


@app.cell
def _():
    _checkpoint = ROOT / str(mo.cli_args().get("model") or "checkpoints/smollm2-135m")
    model = opening.attempt(lesson.open_model, _checkpoint)
    return (model,)


@app.cell
def _(folder, model):
    with mo.status.spinner("Looking for directions (measuring one takes a minute)"):
        steerable = opening.attempt(lesson.load, model, folder, ROOT / "results/lesson")
    get_view, set_view = mo.state(opening.recall(steerable.start, steerable.choices))
    mo.md(rf"""
    ## 6. A real model

    {marks.escaped(model.name)} has {model.config.n_layers} layers and a stream of
    {model.config.d_model:,} numbers for each token. `resid_post.ℓ` is the stream after layer ℓ,
    counted from 0. Strength 1 adds a direction once, at the length that it was measured with (its
    **natural norm** at that layer). Each reply answers *one* prompt: this page shows how steering
    works, the other notebooks show the evidence.

    {steering.opens_with(lesson.token_texts(model, steerable.openings))}
    """)
    return get_view, set_view, steerable


@app.cell
def _(set_view, steerable):
    def _button(name, view):
        return mo.ui.button(label=name, on_change=lambda _: set_view(view))

    example = opening.menu("example", {x: x for x in lesson.EXAMPLES}, label="harmless example")
    own = mo.ui.text_area(label="or your own prompt", max_length=1500, rows=1, full_width=True)
    policy = opening.menu("policy", steerable.policies, label="policy")
    reveal = mo.ui.switch(label="show replies to my own prompt")
    presets = mo.ui.array([_button(*preset) for preset in steerable.presets.items()])
    return example, own, policy, presets, reveal


@app.cell
def _(get_view, steerable):
    _view, _of = get_view(), steerable.choices
    kind = mo.ui.dropdown(_of["kind"], value=_view.kind, label="do")
    direction = mo.ui.dropdown(_of["name"], value=_view.name, label="direction")
    layer = opening.slider("layer", _of["layer"], _view.layer)
    strength = opening.slider("strength", _of["strength"], _view.strength, 0.5)
    coloured = opening.slider("colour by layer", _of["layer"], _view.layer, key="colour")
    return coloured, direction, kind, layer, strength


@app.cell
def _(example, own, policy, steerable):
    _asked = own.value.strip() or example.value, policy.value or None
    prompt = opening.attempt(steerable.model.tokenizer.chat, *_asked)
    baseline = opening.attempt(steerable.read, prompt, [])
    baseline_reply = steerable.reply(baseline)
    return baseline, baseline_reply, prompt


@app.cell
def _(
    baseline, direction, example, kind, layer, own, policy, presets, prompt, reveal, steerable,
    strength,
):  # fmt: skip
    view = lesson.View(kind.value, direction.value, layer.value, strength.value)
    opening.remember(view, steerable.start)
    steered = steerable.read(prompt, steerable.operations(view))
    _rows = [[policy, reveal], presets, [kind, direction], [layer, strength]]
    _controls = [mo.hstack(row, wrap=True, justify="start") for row in _rows]
    _tokens = lesson.next_tokens(steerable.model, baseline, steered)
    _chart = steering.next_token_chart(_tokens, steering.describe(view))
    opening.beside(mo.vstack([example, own, *_controls]), opening.chart(_chart))
    return steered, view


@app.cell
def _(steerable, steered):
    steered_reply = steerable.reply(steered)
    return (steered_reply,)


@app.cell
def _(baseline, baseline_reply, coloured, own, reveal, steerable, steered, steered_reply, view):
    _sides = (baseline, *baseline_reply), (steered, *steered_reply)
    _at = steerable, view.name, coloured.value, baseline
    _strips = [steering.token_strip(*lesson.in_line(*_at, *side)) for side in _sides]
    _veiled = bool(own.value.strip()) and not reveal.value
    replies = mo.Html(steering.reply_cards(view, *_strips, veiled=_veiled))
    mo.vstack([coloured, replies])
    return (replies,)


@app.cell
def _(direction, prompt, replies, steerable):
    # Naming the replies makes this cell run after theirs, because it takes longer.
    assert replies is not None
    _layers = lesson.map_layers(steerable, prompt)
    _total = 1 + (len(lesson.STRENGTHS) - 1) * len(_layers)
    with mo.status.progress_bar(total=_total, title="the map", remove_on_exit=True) as _bar:
        cells = lesson.grid(steerable, prompt, [direction.value], _layers, done=_bar.update)
    return (cells,)


@app.cell
def _(cells, direction, layer, prompt, steerable):
    assert cells is not None
    with mo.status.spinner("Random directions, for comparison"):
        fan = lesson.fan(steerable, prompt, direction.value, layer.value)
    return (fan,)


@app.cell
def _(cells, fan, set_view, steerable, view):
    def _steer(rows):
        for cell in rows.head(1).iter_rows(named=True):
            set_view(lesson.View("add", view.name, cell["layer"], cell["strength"]))

    _map = steering.refusal_map(cells, view)
    clicked = mo.ui.altair_chart(_map, legend_selection=False, on_change=_steer)
    opening.beside(opening.chart(_map, clicked), opening.chart(steering.fan_chart(fan, view)))
    return


@app.cell
def _(policy, steerable):
    with mo.status.spinner("Reading harmful and harmless prompts"):
        states = opening.attempt(lesson.held_out, steerable, policy.value or None)
    _of, _at = steerable.choices, steerable.start.layer
    seen = opening.slider("layer of u·h", _of["layer"], _at, key="seen")
    onto = opening.menu("onto", {x: x for x in _of["name"]}, steerable.refuse.name, label="on")
    return onto, seen, states


@app.cell
def _(baseline, layer, onto, seen, states, steerable, steered, strength, view):
    _names = list(dict.fromkeys([view.name, steerable.start.name, steerable.refuse.name]))
    _depth = steering.depth_chart(lesson.depth(steerable, _names, baseline, steered), _names, view)
    _groups = lesson.groups(steerable, states, onto.value, seen.value)
    _text = r"""
    ## 7. Inside the stream

    Left: *before* the steered layer nothing changes, because information flows only to later
    layers. *At* it the projection jumps by $\alpha$. *After* it every layer reads the changed
    stream, and adds something else. Right: section 1 with real prompts, at one layer.
    """
    _real = steering.histogram(_groups, onto.value, seen.value)
    _sides = (layer, strength, _depth), (seen, onto, _real)
    _parts = [
        mo.vstack([mo.hstack(top, wrap=True), opening.chart(chart)]) for *top, chart in _sides
    ]
    mo.vstack([mo.md(_text), opening.beside(*_parts)])
    return


@app.cell
def _(prompt, steerable):
    _asked = steerable.questions.items() if prompt else ()
    guesses = mo.ui.dictionary({ask: mo.ui.radio(list(of), label=ask) for ask, of in _asked})
    looked = {}
    return guesses, looked


@app.cell
def _(guesses, looked, prompt, steerable):
    for _ask, _guess in guesses.value.items():
        if _guess and _ask not in looked:
            looked[_ask] = lesson.shares(steerable, prompt, steerable.questions[_ask])
    _told = {ask: steering.verdict(guess, looked.get(ask)) for ask, guess in guesses.value.items()}
    _each = [mo.vstack([guesses[ask], mo.md(told)]) for ask, told in _told.items()]
    mo.vstack([mo.md("## 8. Predict, then look"), opening.beside(*_each)])
    return


@app.cell
def _(prompt, steerable):
    mo.stop(not mo.cli_args().get("exported"))
    _names = dict.fromkeys([steerable.start.name, steerable.refuse.name, steerable.random[0]])
    _layers = lesson.map_layers(steerable, prompt)
    _chart = steering.explorer(lesson.grid(steerable, prompt, list(_names), _layers, top=8))
    mo.vstack([mo.md("## Works in this copy too: choose below the chart"), opening.chart(_chart)])
    return


if __name__ == "__main__":
    app.run()
