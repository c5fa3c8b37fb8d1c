"""Publishes a bundle on the Hub.

`push` runs the steps, or only shows them in a dry run: `admission` checks who may write and what is
replaced; `prepare` makes the `contents` of each repository; `upload` sends them; `readback`
compares. `remote` reads what the Hub holds and explains its errors.
"""
