"""The language model: config, transformer, generate; counting and published weights."""
