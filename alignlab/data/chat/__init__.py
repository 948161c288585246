"""Rendering of chats through a tokenizer's chat template, without a loss.

    from_text       chats that are text in the cell of a table
    tool_calls      tools and calls of tools
    thoughts        fields and tags of the assistant's reasoning
    forms           equivalent forms of the same messages
    template        calls of the template
    special_text    spellings of special tokens in texts
    content_check   search for each text of a row in the rendered text
    lossless        search for a form from which the template leaves nothing out
"""
