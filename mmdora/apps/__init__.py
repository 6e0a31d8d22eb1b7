"""What needs several rooms: training runs, evaluation, the doctor, chat, merging."""
