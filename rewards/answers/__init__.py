"""Find, read and compare answers. The rewards that compare with an expected answer share these parts.

    columns.py      what a data set's column holds   -> the expected answer's text, or None
    extraction.py   a completion                     -> texts that may be its final answer, best first
    markup.py       an answer as it was written      -> one plain notation, without Markdown and layout
    expressions.py  plain notation                   -> a tree of operations
    reading.py      an answer's text                 -> quantity, list, interval, relation, matrix, ratio or words
    units.py        what follows a number            -> dimensions and a factor
    evaluation.py   a tree                           -> its value, exact where possible, never a huge computation
    equality.py     two trees or quantities          -> equal or not
    comparison.py   two answers that were read       -> equal or not
    symbolic.py     what none of these can read      -> math-verify, for short texts only

Every part works in time that is bounded by its input's length: lengths, depths and magnitudes are limited before
anything is computed, and no time limit is needed.
"""
