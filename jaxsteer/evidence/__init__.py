"""Tables behind the notebooks' charts: results in, small frames out. Nothing here draws."""
