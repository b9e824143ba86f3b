"""The papers' experiments as commands: each trains, measures, and leaves a report.

`mnist` is section 4.1, `choices` what its text leaves open, `family` section 4.2 (Figures 2 and 3),
`ensemble` section 4.2.3 (Figure 4), `asynchrony` measures what the paper could not show. `report`
writes the pages, `cluster.cli.reproduce` has the commands. Import from the modules themselves.
"""
