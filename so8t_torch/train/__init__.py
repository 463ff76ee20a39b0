"""Training on the library's Trainer: settings, loss, penalty, run folder, memory plan, and the quick start."""
