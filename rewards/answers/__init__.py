"""Find, read and compare answers. The rewards that compare with an expected answer share these parts.

    columns.py      what a data set's column holds   -> the expected answer's text, or None
    extraction.py   a completion                     -> texts that may be its final answer, best first
    remarks.py      a completion                     -> the same without checks, parentheses and second thoughts
    blocks.py       the list below "Answer:"         -> one answer
    boxes.py        a completion                     -> what stands in its last box or boxes
    markup.py       an answer as it was written      -> one plain notation, without Markdown and layout
    brackets.py     plain notation                   -> what stands outside of brackets and in them
    tokens.py       plain notation                   -> numbers, letters, names and signs
    expressions.py  tokens                           -> a tree of operations
    forms.py        what an answer may be: quantity, list, interval, relation, matrix, ratio or words
    reading.py      an answer's text                 -> one of these forms
    units.py        what follows a number            -> dimensions and a factor
    evaluation.py   a tree                           -> its value, exact where possible, never a huge computation
    equality.py     two trees or quantities          -> equal or not
    residues.py     two trees of huge numbers        -> equal or not
    comparison.py   two answers that were read       -> equal or not
    text.py         two answers as text              -> equal or not; choices, yes and no
    symbolic.py     what none of these can read      -> math-verify, for short texts only
    verdict.py      an expected answer, a completion -> right or wrong

Every part works in time that is bounded by its input's length: lengths, depths and magnitudes are limited before
anything is computed, and no time limit is needed.
"""
