class UserError(Exception):
    """Something the user can put right, told in one line: what was wrong, and what would be right.

    The trainer prints the message after ``error:`` and exits with code 2, without a traceback.
    """
