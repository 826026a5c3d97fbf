"""Reasons for things that children ask about, and advice. Written for this purpose."""

from __future__ import annotations

_REASONS = """
the sky is blue
is the sky blue
Sunlight is made of all colours, and the air scatters blue light more than the others.
So blue light reaches our eyes from every part of the sky.
blue

grass is green
is grass green
Grass is full of a green matter that catches sunlight.
The plant uses that light to make its food.
green

leaves fall in autumn
do leaves fall in autumn
Trees drop their leaves to save water in the cold months.
In spring new leaves grow.
tree

it rains
does it rain
Water from the sea and the land rises into the air and forms clouds.
When the drops in a cloud are heavy, they fall as rain.
water

it snows
does it snow
When the air is very cold, the water in clouds freezes into small crystals.
They fall to the ground as snow.
cold

the sea is salty
is the sea salty
Rivers carry a little salt from the rocks into the sea.
The water leaves again as clouds, but the salt stays.
salt

we sleep
do we sleep
The body and the mind need rest after the day.
While we sleep, the body mends itself and the mind orders what it has learned.
rest

we eat
do we eat
Food gives the body the energy to move and to stay warm.
It also gives what the body needs to grow.
energy

we drink water
do we drink water
The body is mostly made of water and loses some of it all day.
So we have to drink to replace it.
body

birds can fly
can birds fly
Birds have wings, light bones and strong muscles.
When they beat their wings, the air carries them.
wings

fish can breathe under water
can fish breathe under water
Fish have gills that take oxygen out of the water.
So they do not need to come up for air.
gills

bees make honey
do bees make honey
Bees make honey as food for the winter.
They collect the sweet juice of flowers and keep it in their hive.
food

cats purr
do cats purr
Cats often purr when they feel safe and content.
Some also purr to calm themselves when they are ill.
feel

dogs bark
do dogs bark
Dogs bark to warn others or to ask for something.
A bark can also show joy.
dog

there is day and night
is there day and night
The earth turns around once a day.
The side that faces the sun has day, and the other side has night.
earth

there are seasons
are there seasons
The earth is tilted on its way around the sun.
So each half of it gets more sun in one part of the year and less in the other.
sun

the moon shines
does the moon shine
The moon has no light of its own.
It shines because the light of the sun falls on it.
sun

the moon changes its shape
does the moon change its shape
The sun always lights one half of the moon.
As the moon moves around the earth, we see more or less of that half.
moon

stars twinkle
do stars twinkle
The air above us moves and bends the light of the stars.
That makes them seem to twinkle.
air

things fall down
do things fall down
The earth pulls all things towards itself.
This pull is called gravity.
earth

ice floats on water
does ice float on water
Ice is lighter than the same amount of water.
So it stays on top.
lighter

ships float
do ships float
A ship pushes water aside, and the water pushes back.
As long as the ship is not too heavy for its size, it floats.
water

metal feels cold
does metal feel cold
Metal carries heat away from the hand quickly.
So it feels colder than wood, though both are equally warm.
heat

fire is hot
is fire hot
When something burns, it joins with the oxygen of the air.
That sets free a lot of heat.
heat

we see lightning before thunder
do we see lightning before thunder
Light is much faster than sound.
So we see the flash first and hear the thunder later.
light

there are rainbows
are there rainbows
Drops of rain bend the light of the sun and split it into its colours.
We see them as a bow in the sky.
light

the wind blows
does the wind blow
The sun warms the air more in some places than in others.
Warm air rises, and cooler air flows in as wind.
air

plants need light
do plants need light
Plants make their food from water, air and the energy of light.
Without light they starve.
food

trees are useful
are trees useful
Trees give us clean air, shade, wood and fruit.
Many animals live in them.
air

we brush our teeth
do we brush our teeth
Bits of food on the teeth feed germs that make holes in them.
Brushing takes them away.
teeth

we wash our hands
do we wash our hands
There are germs on our hands that can make us ill.
Soap and water wash them off.
germs

exercise is good
is exercise good
Exercise makes the heart and the muscles strong.
It also helps us to sleep well and to feel better.
heart

reading is useful
is reading useful
Reading teaches us new words and new ideas.
It also lets us see the world through the eyes of others.
new

we need money
do we need money
Money makes it easy to trade.
With it we can buy what others make without having something that they want.
trade

people go to school
do people go to school
At school people learn to read, to write and to count.
They also learn to live with others.
learn

people wear clothes
do people wear clothes
Clothes keep us warm and protect the skin.
They also show how we want to be seen.
warm

we have friends
do we have friends
Friends help us and share our joys and troubles.
With them we feel less alone.
friends

it is cold in winter
is it cold in winter
In winter the days are short and the sun stands low.
So the ground gets less warmth.
sun

bread rises
does bread rise
Yeast in the dough makes small bubbles of gas.
The bubbles make the bread grow and become soft.
yeast

onions make us cry
do onions make us cry
A cut onion sets free a sharp gas.
It stings the eyes, and tears wash it away.
eyes
"""

REASONS: list[tuple[str, str, str, str, str]] = []
"""What is so, the same as a question after `why`, a sentence that says the reason, one more, and a word of it."""
for _entry in _REASONS.strip().split("\n\n"):
    _so, _asked, _first, _second, _word = _entry.split("\n")
    REASONS.append((_so, _asked, _first, _second, _word))

_ADVICE = """
staying healthy
Eat plenty of fruit and vegetables.
Drink enough water.
Move a little every day.
Sleep eight hours a night.
Wash your hands often.

sleeping well
Go to bed at the same time every day.
Keep the room dark and quiet.
Drink no coffee in the evening.
Put your phone away an hour before.
Take a walk during the day.

learning a language
Practise a little every day.
Learn new words in sentences.
Listen to songs and films.
Speak with others, even with mistakes.
Read simple books.

saving money
Write down what you spend.
Make a list before you shop.
Cook at home.
Wait a day before you buy something.
Put a little aside every month.

making friends
Smile and say hello.
Ask others about themselves.
Listen well.
Join a club.
Be honest and kind.

doing well in an interview
Learn about the company.
Arrive in time.
Wear clean clothes.
Answer clearly and honestly.
Ask a question at the end.

growing plants
Give them enough light.
Water them regularly.
Use good soil.
Take away dry leaves.
Keep them warm in winter.

staying calm
Breathe slowly and deeply.
Count to ten.
Take a short walk.
Talk with a friend.
Think of something pleasant.

keeping a room tidy
Put things back after use.
Make your bed every morning.
Throw away what you do not need.
Use boxes and shelves.
Clean a little every day.

studying for a test
Start early.
Make a plan.
Take short breaks.
Explain the subject to a friend.
Sleep well the night before.

looking after a dog
Walk it every day.
Give it fresh water.
Feed it at the same times.
Play with it.
Take it to the vet once a year.

saving water
Take short showers.
Close the tap while you brush your teeth.
Mend dripping taps.
Water the garden in the evening.
Fill the washing machine.

writing well
Use short sentences.
Say one thing at a time.
Choose simple words.
Read your text aloud.
Cut what is not needed.

travelling
Pack only what you need.
Keep your papers safe.
Learn a few words of the language.
Leave early.
Ask people who live there.

reading more
Always carry a book.
Read a few pages before you sleep.
Choose books that you like.
Visit the library.
Put your phone away.

saving energy
Turn off lights that you do not need.
Close the windows when you heat.
Wash clothes in cold water.
Walk short ways.
Put a lid on the pot.
"""

ADVICE: dict[str, list[str]] = {}
"""Tips by what they are good for."""
for _entry in _ADVICE.strip().split("\n\n"):
    _topic, *_tips = _entry.split("\n")
    ADVICE[_topic] = _tips
