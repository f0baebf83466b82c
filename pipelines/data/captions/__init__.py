"""Long captions of images: prompts, the model's replies and their checks, the journal of replies, and the job."""
