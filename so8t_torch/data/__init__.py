"""Records, labels, chat formatting and the generated scenarios: what a model learns from, with its source named."""
