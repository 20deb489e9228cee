"""The paper's table and figures: sweeps of runs, their results, tables, reports, plots."""
