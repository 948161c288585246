"""Training data made by models: preference labels, revisions, completions of a teacher."""
