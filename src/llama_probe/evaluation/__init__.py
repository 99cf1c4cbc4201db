"""Metrics, calibration, plots and reports: how good a head is, and where it looked.

- `prediction`: outputs of heads for a data set. `report`: their metrics with confidence intervals, from `metrics`, `bootstrap` and
  `calibration`. `detection` is for replies.
- `transformations`, `novelty_fit`: prompts that are wrapped or disguised, or unlike the training data.
- `scoring_job`: scores files of any size. `scored_files` compares two of its outputs. `resume`: checks the settings of a run that
  resumes another run.
- `reading`: weights of the tokens and layers of a text, which `heatmap` draws. `plots`: all other figures.
"""
