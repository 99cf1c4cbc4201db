"""Metrics, calibration, plots and reports: the worth of a head, and where it looked.

- `prediction`: outputs of heads for a data set. `report`: their metrics with confidence intervals, from `metrics`, `bootstrap` and
  `calibration`. `detection` is for replies.
- `transformations`, `novelty_fit`: prompts that are wrapped or disguised, or unlike the training data.
- `scoring_job`: scores files of any size. `scored_files` compares two of its outputs. `resume`: lets only a run with the same settings resume another.
- `reading`: weights of the tokens and layers of a text, drawn by `heatmap`. `plots`: all other figures.
"""
