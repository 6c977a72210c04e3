"""The paper's section 4, run again. ``digits`` and ``idx`` read data, ``mnist`` trains, ``record`` keeps."""
