"""How steering works: from two vectors you drag to a model you steer.

marimo edit notebooks/1_how_steering_works.py
python notebooks/1_how_steering_works.py -- --results results/smollm2-demo-smollm2-135m
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="1. How steering works")

with app.setup:
    from pathlib import Path

    import marimo as mo

    from jaxsteer.data import prompts
    from jaxsteer.errors import UserError
    from jaxsteer.evidence import lesson
    from jaxsteer.evidence.charts import steering, text, theme
    from jaxsteer.evidence.charts.plane import plane
    from jaxsteer.generation.compile_cache import use_compile_cache
    from jaxsteer.model.chat_model import ChatModel

    theme.use()
    use_compile_cache()
    ROOT = Path(__file__).resolve().parent.parent


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # How steering works

    A language model reads a prompt token by token. For every token it keeps one long vector, the
    **residual stream**, and every layer *adds* something to it:

    $$h_{\ell+1} = h_\ell + \text{attention}_\ell(h_\ell, \ldots) + \text{mlp}_\ell(\ldots)$$

    At the end the vector is turned into probabilities of the next token. So whatever the model
    "knows" about a token at some depth, it knows as a vector, and to **steer** a model is to change
    that vector on the way. Nothing is trained, and no prompt is edited.

    Some properties of a text, such as "this request is to be refused" or "I am an obliging
    persona", turn out to lie, approximately, along a **direction** $d$ of the stream: take the mean
    stream over prompts that have the property, subtract the mean over prompts that do not, and the
    difference is $d$. Three things can be done to a state $h$ with a direction, and
    $u = d / \lVert d \rVert$ is its unit vector:

    | step | formula | in words |
    | --- | --- | --- |
    | add | $h + \alpha\, d$ | push the state along the direction |
    | project out | $h - (u \cdot h)\, u$ | remove whatever it has of the direction |
    | cap | $h + (\text{clip}(u \cdot h, -b, b) - u \cdot h)\, u$ | allow it only so much of it |

    First in two dimensions, where one can see everything; then in the 576 dimensions of SmolLM2.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 1. Add

    **Drag the tips** of $h$ and $d$ (or focus one and use the arrow keys). The state that leaves
    the layer is $h' = h + \alpha d$. Below the plane stands $u \cdot h$, the *projection*: the
    length of the shadow that $h$ throws on the direction, negative when it points the other way.

    What to look for: adding moves the shadow by exactly $\alpha \lVert d \rVert$, wherever $h$
    lies, and leaves the part of $h$ perpendicular to $d$ alone. It does not rotate a state
    "towards the persona", and it does not ask whether the state had any of it already.
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

    The shadow goes from {_before_u:+.2f} to {_after_u:+.2f}, by {_after_u - _before_u:+.2f}; and
    $\alpha \lVert d \rVert$ is {_v["strength"] * lesson.norm(_v["d"]):+.2f}.
    """)
    mo.hstack([add_plane, _explained], widths=[1.15, 1], gap=2, wrap=True, align="start")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 2. Project out

    To project a direction out is to drop the shadow: $h' = h - (u \cdot h)\, u$. The result lies on
    the dotted line through the origin perpendicular to $d$. The *length* of $d$ plays no part, and
    neither does its sign.

    In matrix form $h' = (I - u u^\top)\, h$. That matrix is a **projector**: applied twice it does
    what it does once, and it has no inverse. From $h'$ alone no later layer can read off how much
    of $d$ the state had. (It may still guess, from what else the state says, and write it again.)

    Several directions are removed *together*, as the span of an orthonormal basis. Removing
    directions that are not perpendicular one after another depends on their order, and leaves a
    remainder.
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
    $h' = ({_after[0]:.2f}, {_after[1]:.2f})$, and its shadow is
    {lesson.projections_2d(_v["d"], [_after])[0]:+.2f}.

    By Pythagoras $\lVert h \rVert^2 = (u \cdot h)^2 + \lVert h' \rVert^2$: of this state's squared
    length {_kept:.0%} survives. In a plane one direction is half of all there is. In 576 dimensions
    a *random* direction holds about 1/576 of a state, so projecting out a random direction is
    no match for projecting out one that holds much of the state: a fair control removes as much.
    """)
    mo.hstack([project_plane, _explained], widths=[1.15, 1], gap=2, wrap=True, align="start")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 3. Cap

    Capping is projection with mercy: inside the band $|u \cdot h| \le b$ nothing happens, outside
    it the shadow is cut to the bound. With $b = 0$ it *is* projecting out. Move $h$ in and out of
    the band.
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
    The shadow is {_before_u:.2f}, the bound {_v["high"]:.2f}:
    {
        "inside the band, so the state passes as it is."
        if _inside
        else f"outside, so it is cut to {_after_u:.2f}."
    }

    Adding pushes *every* state by the same vector, also one that needed no push. A cap acts only on
    the states that have gone too far and leaves the others bit for bit as they are.
    """)
    mo.hstack([cap_plane, _explained], widths=[1.15, 1], gap=2, wrap=True, align="start")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 4. Why projecting out where you added cancels

    Now both, at the same layer: first add $\alpha d$, then project $d$ out. Two roads are drawn,
    one with the addition (orange, then green) and one without it (grey); all run along $d$, and
    stand side by side only to be seen. **Move the strength**: the end point does not move.

    $$(I - u u^\top)(h + \alpha d)
    = (I - u u^\top)\, h + \alpha \underbrace{(I - u u^\top)\, d}_{=\,0}
    = (I - u u^\top)\, h$$

    since $d$ is nothing but a multiple of $u$. This is why a study must be careful with a sentence
    such as "the persona was added at layer 20, and when we knocked it out *at layer 20* refusal
    came back". Of course it did: by algebra that model was never steered, whatever the strength.
    It says nothing about where in the model refusal lives. jaxsteer marks such conditions
    `cancels_steering`, and runs each knockout also without steering, as its control.
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
    | road | ends at |
    | --- | --- |
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
    `resid_post.ℓ` is the stream as block ℓ leaves it, counted from 0. Its **persona** direction was
    measured from prompts that ask for an obliging or for a refusing character; its **refusal**
    direction from harmful against harmless requests.

    One caution before the fun: the directions come from one small model and one set of prompts,
    and a reply is one reply. What follows shows the *mechanism*. Evidence needs many prompts,
    controls and intervals: that is what the other notebooks are for.
    """)
    return


@app.cell
def _():
    _given = mo.cli_args()
    checkpoint = ROOT / str(_given.get("model") or "checkpoints/smollm2-135m")
    results = mo.ui.text(
        value=str(_given.get("results") or "results/smollm2-demo-smollm2-135m"),
        label="results directory, for its directions",
        full_width=True,
    )
    results  # noqa: B018
    return checkpoint, results


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
def _(model, results):
    try:
        with mo.status.spinner(
            "Looking for directions (extracting takes a minute)", remove_on_exit=True
        ):
            steerable = lesson.load(
                model,
                ROOT / results.value / "directions.safetensors",
                ROOT / "results/lesson/directions.safetensors",
            )
        _error = None
    except UserError as error:
        steerable, _error = None, str(error)
    mo.stop(steerable is None, mo.callout(mo.plain_text(_error or ""), kind="danger"))
    return (steerable,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Type a prompt or take an example, then move the layer and the strength. A strength of 1 adds the
    direction once, at the length with which it was measured (its *natural norm* at that layer).
    The policy is the system prompt: without one this small model refuses nothing.
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
    direction = mo.ui.dropdown(_names, value=_names[0], label="direction")
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
    mo.stop(baseline is None, mo.callout(mo.plain_text(_error), kind="danger"))
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
            mo.md(f"In all, **{_moved:.1%}** of the next token's probability has moved."),
        ]
    )
    next_tokens  # noqa: B018
    return (next_tokens,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    **The reply, greedily, at most 24 tokens.** One reply can change by a single word early on and
    go elsewhere from there, so do not read much into its wording; the probabilities above are the
    steadier view.
    """)
    return


@app.cell
def _(baseline, steerable):
    baseline_reply = list(steerable.replies(baseline))[-1]
    return (baseline_reply,)


@app.cell
def _(baseline_reply, depth, next_tokens, own, reveal, steerable, steered, what):
    # Naming the charts makes this cell wait for them: they are there sooner than a whole reply.
    assert next_tokens is not None and depth is not None
    _veiled = bool(own.value.strip()) and not reveal.value
    _note = "Replies to your own prompt are blurred until you ask for them." if _veiled else ""
    _before = text.card("baseline", baseline_reply, "baseline", veiled=_veiled)
    for _reply in steerable.replies(steered):
        _after = text.card(what, _reply, "persona", veiled=_veiled)
        replies = mo.Html(text.cards(_before, _after, note=_note))
        mo.output.replace(replies)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 6. Inside the stream

    The projections of the stream on two directions, in **natural norms**: adding $\alpha$ times a
    direction at a layer raises its own projection there by exactly $\alpha$. Two things to see:

    - *Below* the steered layer nothing changes, for there is no way back. *At* it the jump is
      $\alpha$. *Above* it the jump neither stays nor fades by itself: the blocks read the stream,
      and write their answer to what they find there.
    - Steering with one direction moves the projection on the *other* as well, by their cosine at
      once, and by what the blocks make of it later.
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

    Section 4 holds at 576 dimensions as it does at two. Below, the direction is added at a layer
    and projected out $k$ layers later; each point compares that with projecting out *alone* at the
    same place, and counts how much next-token probability the addition still moves. At $k = 0$ it
    moves nothing. At $k > 0$ the blocks in between have read the added vector and written other
    things because of it, in directions that the projection does not touch: what survives is those.
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
            Projecting and capping use $u u^\top$, and $(-u)(-u)^\top = u u^\top$. The band of our
            cap is symmetric, so it does not care either; with different bounds on the two sides it
            would.
            """),
            "**2.** First project out d, then add α d. Is that the same as adding and then "
            "projecting?": mo.md(r"""
            No. $(I - uu^\top)\, h + \alpha d$ has the shadow $\alpha \lVert d \rVert$ for *every*
            $h$, while adding first ends at shadow 0. Project-then-add **sets** the projection to a
            chosen value. The order of the steps is part of an intervention's definition; in
            jaxsteer it is add, project, cap.
            """),
            "**3.** Where α d was added you project out v, not d but close to it. What is left "
            "of the addition?": mo.md(r"""
            $\alpha\,(d - (v \cdot d)\, v)$ for a unit vector $v$. Its length is
            $\alpha \lVert d \rVert \sin\theta$, with $\theta$ the angle between the two. At a
            cosine of 0.9 that is 44 % of the push: "nearly the same direction" does not nearly
            cancel.
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
            Adding $0 \cdot d$ is the identity, bit for bit. Projecting has no strength: it takes
            away whatever the *unsteered* stream has of the direction, and that is not nothing.
            Hence a knockout needs its own control without steering: part of its effect has nothing
            to do with the steer.
            """),
            "**5.** Steer at layer 5, then at the last layer, with the same strength. Which moves "
            "the next token more, and why is the comparison not fair?": mo.md(r"""
            Try both. One natural norm is another length at every layer: the stream, and with it the
            difference of means, grows with depth. And an early steer passes through many more
            blocks, which may amplify or undo it. Compare at equal *shares of the residual norm*,
            and count over many prompts.
            """),
            "**6.** Steer with a random direction of the same norm. What would you see if the "
            "persona's effect were only a matter of pushing hard?": mo.md(r"""
            The same as with the persona. If random directions move clearly less, the *direction*
            matters and not only the size of the push. One random direction proves little, because
            its effect varies; a study draws twenty or more, and compares with their spread.
            """),
        },
        multiple=True,
    )
    return


if __name__ == "__main__":
    app.run()
