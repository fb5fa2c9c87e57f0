"""A chat model and texts come in; directions in its residual stream go out, with provenance.

Begin with `extraction`, the table of the kinds of direction. It lists the chats behind each kind;
`samples` runs them and reads the stream at a tap; the difference of the samples' means is a
`direction`, a value with arithmetic, a file format, and a notation for interventions with it.
`samples.shifts` says how far system prompts move the stream along directions;
`evidence.reliability` says how well directions are known.
"""
