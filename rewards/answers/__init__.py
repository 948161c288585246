"""Find, read and compare answers, for the rewards that have an expected answer.

    columns.py      entry of a dataset's column      -> the expected answer's text, or None
    thinking.py     completion of a thinking model   -> the text behind its reasoning
    extraction.py   completion                       -> places that may state the final answer, best first
    sentences.py    sentence                         -> texts in it that may be the answer, best first
    remarks.py      completion                       -> the same without checks, parentheses and second thoughts
    blocks.py       list below "Answer:"             -> one answer
    boxes.py        completion                       -> content of its last box or boxes
    markup.py       answer as it was written         -> plain notation, without Markdown and layout
    brackets.py     plain notation                   -> the parts outside of brackets and inside
    tokens.py       plain notation                   -> numbers, letters, commands and signs
    expressions.py  tokens                           -> a tree of operations
    forms.py        the forms of an answer: quantity, list, interval, relation, matrix, ratio or words
    reading.py      answer's text                    -> one of these forms
    quantities.py   number with a unit or currency   -> a quantity
    units.py        text behind a number             -> dimensions and a factor
    evaluation.py   tree                             -> its value, exact where possible, never a huge computation
    exact.py        power or root of a fraction      -> its exact value, if it has a small one
    equality.py     two trees                        -> equal or not
    residues.py     two trees of huge numbers        -> equal or not
    comparison.py   two answers that were read       -> equal or not
    intervals.py    interval, inequality or union    -> intervals, for comparison
    text.py         two answers as text              -> equal or not; choices, yes and no
    symbolic.py     short texts in other notation    -> equal or not, by math-verify
    verdict.py      expected answer and completion   -> right or wrong
    options.py      options of a reward              -> an error, if one is wrong

Every part works in time that is bounded by its input's length: lengths, depths and magnitudes are limited before
anything is computed, and no time limit is needed.
"""
