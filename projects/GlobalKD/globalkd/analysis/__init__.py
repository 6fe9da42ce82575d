"""Looking at trained runs: loading them, their reliability weights, figures."""
