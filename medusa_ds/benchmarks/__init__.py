"""A recipe's steps become figures: cases, what they measure, where the time goes, pictures."""
