"""Charts: one look (`marks`), and the charts of each notebook. Data in, Altair chart out.

Nothing here computes a result: the numbers come from the rest of the library, and the notebooks
import both. `opening` reads a results folder, and makes the controls and the header that all
notebooks share. Needs the `notebooks` extra.
"""
