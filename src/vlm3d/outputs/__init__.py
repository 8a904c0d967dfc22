"""What a user receives: a folder with the prediction, the masks, the report and a page to read.

`writer.write_prediction` is the one entrance; it writes all of it or nothing.
"""
