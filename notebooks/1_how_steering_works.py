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

    from jaxsteer.data import prompts
    from jaxsteer.data.wheels import use_compile_cache
    from jaxsteer.errors import UserError
    from jaxsteer.evidence import lesson
    from jaxsteer.evidence.charts import marks, opening, steering
    from jaxsteer.evidence.charts.steering import plane
    from jaxsteer.model.chat_model import ChatModel
    from jaxsteer.words import percent, signed

    marks.use()
    use_compile_cache()
    ROOT = Path(__file__).resolve().parent.parent


@app.cell
def _():
    results = opening.results_menu(ROOT)
    mo.vstack([mo.md("# How steering works"), results])
    return (results,)


@app.cell
def _(results):
    _head = opening.head(ROOT, "1_how_steering_works.py", results.value)
    folder = ROOT / results.value
    _head  # noqa: B018
    return (folder,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    A language model reads a prompt token by token. For every token it keeps one long vector, the
    **residual stream**, and every layer *adds* something to it:

    $$h_{\ell+1} = h_\ell + \text{attention}_\ell(h_\ell, \ldots) + \text{mlp}_\ell(\ldots)$$

    After the last layer the vector is turned into probabilities of the next token. To **steer** a
    model is to change this vector at some layer. Nothing is trained, and no prompt is edited.

    Some properties of a text, such as "this request should be refused" or "the assistant has a
    compliant persona", correspond approximately to a **direction** $d$ of the stream: take the mean
    stream over prompts with the property, subtract the mean over prompts without it, and the
    difference is $d$. There are three ways to change a state $h$ with a direction;
    $u = d / \lVert d \rVert$ is its unit vector:

    | step | formula | in words |
    | :--- | :--- | :--- |
    | add | $h + \alpha\, d$ | move the state along the direction |
    | project out | $h - (u \cdot h)\, u$ | remove the state's component along the direction |
    | cap | $h + (\text{clip}(u \cdot h, -b, b) - u \cdot h)\, u$ | limit that component |

    First in two dimensions, where everything can be drawn; then in the 576 dimensions of SmolLM2.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 1. Add

    **Drag the tips** of $h$ and $d$ (or focus one and use the arrow keys). The new state is
    $h' = h + \alpha d$. The number below the plane is $u \cdot h$, the *projection* of $h$ on the
    direction; it is negative when $h$ points the other way.

    What to look for: adding changes the projection by exactly $\alpha \lVert d \rVert$, for every
    $h$, and does not change the part of $h$ that is perpendicular to $d$. It does not rotate a
    state "towards the persona", and the change does not depend on the projection before it.
    """)
    return


@app.cell
def _():
    add_plane = mo.ui.anywidget(plane(["add"], h=(-1.0, 2.0), d=(1.5, 0.5), strength=1.0))
    return (add_plane,)


@app.cell
def _(add_plane):
    _v = add_plane.value
    _h, _after = lesson.steer_2d(_v["h"], _v["d"], ["add"], strength=_v["strength"])
    _before_u, _after_u = lesson.projections_2d(_v["d"], [_h, _after])
    _explained = mo.md(rf"""
    In numbers, computed by the library's own `interventions.apply`:

    $h' = ({_h[0]:.2f}, {_h[1]:.2f}) {_v["strength"]:+.2f} \cdot
    ({_v["d"][0]:.2f}, {_v["d"][1]:.2f}) = ({_after[0]:.2f}, {_after[1]:.2f})$

    The projection goes from {signed(_before_u)} to {signed(_after_u)}, by
    {signed(_after_u - _before_u)}; and $\alpha \lVert d \rVert$ is
    {signed(_v["strength"] * lesson.norm(_v["d"]))}.
    """)
    mo.hstack([add_plane, _explained], widths=[1.15, 1], gap=2, wrap=True, align="start")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 2. Project out

    Projecting a direction out makes the projection zero: $h' = h - (u \cdot h)\, u$. The result is
    on the dotted line through the origin perpendicular to $d$. It depends neither on the *length*
    of $d$ nor on its sign.

    In matrix form $h' = (I - u u^\top)\, h$. That matrix is a **projector**: applying it twice is
    the same as applying it once, and it has no inverse. A later layer cannot recover the removed
    projection from $h'$ alone. (It may still estimate it from other components of the state, and
    write it again.)

    Several directions are removed *together*, as the span of an orthonormal basis. If directions
    that are not perpendicular are removed one after another, the result depends on their order and
    is not free of all of them.
    """)
    return


@app.cell
def _():
    project_plane = mo.ui.anywidget(plane(["project"], h=(1.5, 2.5), d=(2.0, 0.5)))
    return (project_plane,)


@app.cell
def _(project_plane):
    _v = project_plane.value
    _h, _after = lesson.steer_2d(_v["h"], _v["d"], ["project"])
    _kept = lesson.norm(_after) ** 2 / max(lesson.norm(_h) ** 2, 1e-12)
    _explained = mo.md(rf"""
    $h' = ({_after[0]:.2f}, {_after[1]:.2f})$, and its projection is
    {signed(lesson.projections_2d(_v["d"], [_after])[0])}.

    By Pythagoras $\lVert h \rVert^2 = (u \cdot h)^2 + \lVert h' \rVert^2$: of this state's squared
    length {percent(_kept)} remains. A plane has two dimensions, so one direction is half of them.
    In 576 dimensions a *random* direction holds about 1/576 of a state's squared length. Projecting
    it out changes far less than projecting out a direction that holds much of the state: a fair
    control must remove as much.
    """)
    mo.hstack([project_plane, _explained], widths=[1.15, 1], gap=2, wrap=True, align="start")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 3. Cap

    Capping limits the projection: inside the band $|u \cdot h| \le b$ nothing changes, outside it
    the projection is clipped to the bound. With $b = 0$ it is the same as projecting out. Move $h$
    in and out of the band.
    """)
    return


@app.cell
def _():
    cap_plane = mo.ui.anywidget(plane(["cap"], h=(2.5, 1.5), d=(1.5, 0.0), high=1.0))
    return (cap_plane,)


@app.cell
def _(cap_plane):
    _v = cap_plane.value
    _states = lesson.steer_2d(_v["h"], _v["d"], ["cap"], high=_v["high"])
    _before_u, _after_u = lesson.projections_2d(_v["d"], _states)
    _inside = abs(_before_u) <= _v["high"] + 1e-6
    _explained = mo.md(rf"""
    The projection is {signed(_before_u)}, the bound {_v["high"]:.2f}:
    {
        "inside the band, so the state does not change."
        if _inside
        else f"outside, so it is clipped to {signed(_after_u)}."
    }

    Adding moves *every* state by the same vector. A cap changes only the states outside the band
    and leaves the others identical, bit for bit.
    """)
    mo.hstack([cap_plane, _explained], widths=[1.15, 1], gap=2, wrap=True, align="start")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 4. Why projecting out where you added cancels

    Now both, at the same layer: first add $\alpha d$, then project $d$ out. Two paths are drawn,
    one with the addition (orange, then green) and one without it (grey). Both are parallel to $d$,
    and a small gap keeps them apart in the drawing. **Move the strength**: the end point does not
    move.

    $$(I - u u^\top)(h + \alpha d)
    = (I - u u^\top)\, h + \alpha \underbrace{(I - u u^\top)\, d}_{=\,0}
    = (I - u u^\top)\, h$$

    because $d$ is a multiple of $u$. A study must therefore be careful with a sentence such as "the
    persona was added at layer 20, and when it was projected out *at layer 20* refusal came back".
    By algebra that model was never steered, at any strength, so the result says nothing about the
    layers at which refusal is decided. jaxsteer marks such conditions `cancels_steering`, and runs
    each knockout also without steering, as its control.
    """)
    return


@app.cell
def _():
    cancel_plane = mo.ui.anywidget(
        plane(["add", "project"], h=(-1.5, 2.0), d=(1.5, -0.25), strength=2.5)
    )
    return (cancel_plane,)


@app.cell
def _(cancel_plane):
    _v = cancel_plane.value
    _with = lesson.steer_2d(_v["h"], _v["d"], ["add", "project"], strength=_v["strength"])[-1]
    _without = lesson.steer_2d(_v["h"], _v["d"], ["project"])[-1]
    _explained = mo.md(rf"""
    | path | ends at |
    | :--- | :--- |
    | add {_v["strength"]:+.2f} $d$, then project out | ({_with[0]:.3f}, {_with[1]:.3f}) |
    | project out only | ({_without[0]:.3f}, {_without[1]:.3f}) |

    The two differ by {lesson.norm(_with - _without):.1g}: at most the rounding of 32-bit numbers.
    """)
    mo.hstack([cancel_plane, _explained], widths=[1.15, 1], gap=2, wrap=True, align="start")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 5. A real model

    SmolLM2-135M-Instruct has 30 layers and a stream of 576 numbers per token. Here
    `resid_post.ℓ` is the stream after block ℓ, counted from 0. The **persona** direction was
    measured from system prompts that ask for a compliant or for a refusing character; the
    **refusal** direction from harmful against harmless requests.

    One caution: the directions come from one small model and one set of prompts, and each reply
    below answers one prompt. This page shows the *mechanism*. Evidence needs many prompts, controls
    and intervals: the other notebooks have those.
    """)
    return


@app.cell
def _():
    checkpoint = ROOT / str(mo.cli_args().get("model") or "checkpoints/smollm2-135m")
    return (checkpoint,)


@app.cell
def _(checkpoint):
    _missing = not (checkpoint / "manifest.json").is_file()
    _words = f"There is no model in {checkpoint}: run `make demo` once, then open this page again."
    if _missing and mo.app_meta().mode == "script":
        print(_words)
    mo.stop(_missing, mo.callout(mo.md(_words), kind="warn"))
    model = ChatModel.load(checkpoint, verify=False)
    return (model,)


@app.cell
def _(folder, model):
    try:
        with mo.status.spinner(
            "Looking for directions (extracting takes a minute)", remove_on_exit=True
        ):
            steerable = lesson.load(
                model,
                folder / "directions.safetensors",
                ROOT / "results/lesson/directions.safetensors",
            )
        _error = None
    except UserError as error:
        steerable, _error = None, str(error)
    mo.stop(steerable is None, mo.callout(mo.md(marks.escaped(_error or "")), kind="danger"))
    return (steerable,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Type a prompt or take an example, then move the layer and the strength. A strength of 1 adds the
    direction once, at the length with which it was measured (its *natural norm* at that layer).
    The policy is the system prompt: without one this small model refuses almost nothing.
    """)
    return


@app.cell
def _():
    example = mo.ui.dropdown(lesson.EXAMPLES, value=lesson.EXAMPLES[0], label="a harmless example")
    own = mo.ui.text_area(
        placeholder="or a prompt of your own, which replaces the example",
        max_length=1500,
        rows=2,
        full_width=True,
    )
    policy = mo.ui.dropdown(
        {"refuse what is harmful": "safety-v1", "be helpful": "generic", "none": None},
        value="refuse what is harmful",
        label="policy",
    )
    reveal = mo.ui.switch(label="show replies to my own prompt")
    mo.vstack([mo.hstack([example, policy], justify="start", gap=2, wrap=True), own, reveal])
    return example, own, policy, reveal


@app.cell
def _(steerable):
    _layers = steerable.model.config.n_layers
    _names = list(steerable.directions)
    direction = mo.ui.dropdown(_names, value=steerable.watched[0], label="direction")
    kind = mo.ui.radio(
        {"add": "add", "project out": "project", "cap": "cap"}, value="add", inline=True
    )
    layer = mo.ui.slider(
        0, _layers - 1, value=round(0.7 * _layers), label="layer", show_value=True, debounce=True
    )
    strength = mo.ui.slider(
        -8, 8, 0.5, value=4, label="strength (add) or bound (cap)", show_value=True, debounce=True
    )
    mo.vstack(
        [
            mo.hstack([kind, direction], justify="start", gap=2),
            mo.hstack([layer, strength], justify="start", gap=2, wrap=True),
        ]
    )
    return direction, kind, layer, strength


@app.cell
def _(example, own, policy, steerable):
    try:
        _system = prompts.policy(policy.value).text if policy.value else None
        prompt = steerable.model.tokenizer.chat(own.value.strip() or example.value, _system)
        baseline = steerable.read(prompt, [])
        _error = ""
    except UserError as error:
        prompt = baseline = None
        _error = str(error)
    mo.stop(baseline is None, mo.callout(mo.md(marks.escaped(_error)), kind="danger"))
    return baseline, prompt


@app.cell
def _(direction, kind, layer, prompt, steerable, strength):
    _operations = steerable.operation(kind.value, direction.value, layer.value, strength.value)
    what = steering.describe(kind.value, direction.value, layer.value, strength.value)
    steered = steerable.read(prompt, _operations)
    return steered, what


@app.cell
def _(baseline, steerable, steered, what):
    _tokens = lesson.next_tokens(steerable.model, baseline, steered)
    _moved = lesson.moved(baseline.logits, steered.logits)
    next_tokens = mo.vstack(
        [
            mo.as_html(steering.next_token_chart(_tokens, what)),
            mo.md(f"In all, **{percent(_moved, 1)}** of the next token's probability has moved."),
        ]
    )
    next_tokens  # noqa: B018
    return (next_tokens,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    **The reply, decoded greedily, at most 24 tokens.** A reply can differ in one early word and
    continue differently after it, so do not read much into its wording. The probabilities above
    are the more stable measure.
    """)
    return


@app.cell
def _(baseline, steerable):
    baseline_reply = list(steerable.replies(baseline))[-1]
    return (baseline_reply,)


@app.cell
def _(baseline_reply, depth, next_tokens, own, reveal, steerable, steered, what):
    # Naming the charts makes this cell run after theirs, because a whole reply takes longer.
    assert next_tokens is not None and depth is not None
    _veiled = bool(own.value.strip()) and not reveal.value
    _note = "Replies to your own prompt are blurred until you ask for them." if _veiled else ""
    _before = marks.card("baseline", baseline_reply, "baseline", veiled=_veiled)
    for _reply in steerable.replies(steered):
        _after = marks.card(what, _reply, "persona", veiled=_veiled)
        replies = mo.Html(marks.cards(_before, _after, note=_note))
        mo.output.replace(replies)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 6. Inside the stream

    The projections of the stream on two directions, in **natural norms**: adding $\alpha$ times a
    direction at a layer raises its own projection there by exactly $\alpha$. Two things to see:

    - *Before* the steered layer nothing changes, because information flows only to later layers.
      *At* it the projection jumps by $\alpha$. *After* it the projection changes again: each block
      reads the changed stream, and so its own output changes.
    - Steering with one direction also changes the projection on the *other* one: at the steered
      layer in proportion to their cosine, and later through the blocks.
    """)
    return


@app.cell
def _(baseline, layer, prompt, steerable, steered, what):
    table = lesson.projections(steerable, prompt, baseline, steered)
    depth = steering.depth_chart(table, layer.value, what)
    depth  # noqa: B018
    return depth, table


@app.cell
def _():
    shown = mo.ui.radio(
        {"change": "change", "before": "baseline", "after": "steered"}, value="change", inline=True
    )
    whole = mo.ui.switch(label="whole prompt, policy included")
    mo.hstack([shown, whole], justify="start", gap=2)
    return shown, whole


@app.cell
def _(shown, table, what, whole):
    steering.token_map(table, shown.value, what, last=None if whole.value else 24)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 7. The cancellation, on the real model

    Section 4 holds in 576 dimensions as it does in two. Below, the direction is added at a layer
    and projected out $k$ layers later. Each point compares that with the projection *alone* at the
    same layer, and measures how much next-token probability the addition still moves. At $k = 0$ it
    moves nothing. At $k > 0$ the blocks in between have read the added vector and changed their
    output in other directions, which the projection does not remove.
    """)
    return


@app.cell
def _(steerable):
    _layers = steerable.model.config.n_layers
    added_at = mo.ui.slider(
        0, _layers - 1, value=_layers // 2, label="added at layer", show_value=True, debounce=True
    )
    added = mo.ui.slider(-8, 8, 0.5, value=4, label="strength", show_value=True, debounce=True)
    mo.hstack([added_at, added], justify="start", gap=2, wrap=True)
    return added, added_at


@app.cell
def _(added, added_at, direction, prompt, steerable):
    _survived = lesson.survival(steerable, prompt, direction.value, added_at.value, added.value)
    _what = steering.describe("add", direction.value, added_at.value, added.value)
    steering.survival_chart(_survived, _what)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Exercises

    Try first, then unfold.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.accordion(
        {
            "**1.** Turn d around, by dragging its tip to the opposite side. What changes for add, "
            "project and cap?": mo.md(r"""
            Only **add** changes: it now pushes the other way, as if $\alpha$ had changed sign.
            Projecting and capping use $u u^\top$, and $(-u)(-u)^\top = u u^\top$. The band of this
            cap is symmetric, so its result does not change; with different bounds on the two sides
            it would.
            """),
            "**2.** First project out d, then add α d. Is that the same as adding and then "
            "projecting?": mo.md(r"""
            No. $(I - uu^\top)\, h + \alpha d$ has the projection $\alpha \lVert d \rVert$ for
            *every* $h$, while adding first ends at projection 0. Project-then-add **sets** the
            projection to a chosen value. The order of the steps is part of an intervention's
            definition; in jaxsteer it is add, project, cap.
            """),
            "**3.** Where α d was added you project out v, not d but close to it. What is left "
            "of the addition?": mo.md(r"""
            $\alpha\,(d - (v \cdot d)\, v)$ for a unit vector $v$. Its length is
            $\alpha \lVert d \rVert \sin\theta$, with $\theta$ the angle between the two. At a
            cosine of 0.9 that is 44 % of the added length: "nearly the same direction" does not
            nearly cancel.
            """),
        },
        multiple=True,
    )
    return


@app.cell(hide_code=True)
def _():
    mo.accordion(
        {
            "**4.** On the model, set the strength to 0; then choose project out. Why does the "
            "first change nothing, and the second something?": mo.md(r"""
            Adding $0 \cdot d$ is the identity, bit for bit. Projecting has no strength: it removes
            the component that the *unsteered* stream has along the direction, which is not zero.
            Hence a knockout needs its own control without steering: part of its effect has nothing
            to do with the steering.
            """),
            "**5.** Steer at layer 5, then at the last layer, with the same strength. Which moves "
            "the next token more, and why is the comparison not fair?": mo.md(r"""
            Try both. One natural norm is a different length at every layer: the stream, and with it
            the difference of means, grows with depth. And an early change passes through many more
            blocks, which may amplify or undo it. Compare at equal *shares of the residual norm*,
            and count over many prompts.
            """),
            "**6.** Steer with a random direction of the same norm. What would you see if the "
            "persona's effect were only a matter of the added length?": mo.md(r"""
            The same as with the persona. If random directions move clearly less, the *direction*
            matters and not only the added length. One random direction proves little, because
            its effect varies; a study draws twenty or more, and compares with their spread.
            """),
        },
        multiple=True,
    )
    return


if __name__ == "__main__":
    app.run()
