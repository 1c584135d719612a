"""A vision-language model as a judge, behind an endpoint or in this process."""
