"""A study: experiments, runs side by side, results, statistics, figures, report."""
