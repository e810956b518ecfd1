"""Messages between the roles of one job: what they are (`messages`), how they are encoded (`codec`), who may send them (`auth`)."""
