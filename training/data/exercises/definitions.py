"""What words mean, in a line each, with a word that no right answer lacks. Written for this purpose."""

from __future__ import annotations

_LINES = """
dog | an animal that people keep as a pet and that barks | animal
cat | a small animal that people keep as a pet and that catches mice | animal
horse | a large animal that people ride | animal
cow | a large farm animal that gives milk | animal
sheep | a farm animal that gives wool | animal
lion | a large wild cat that lives in Africa | cat
elephant | a very large grey animal with a trunk | animal
rabbit | a small animal with long ears | animal
owl | a bird that hunts at night | bird
penguin | a black and white bird that swims and cannot fly | bird
hen | a bird that people keep for its eggs | bird
bee | an insect that makes honey | insect
ant | a small insect that lives in a colony | insect
butterfly | an insect with large coloured wings | insect
spider | a small animal with eight legs that spins a web | legs
snake | a long animal without legs | animal
fish | an animal that lives in water and breathes with gills | water
apple | a round fruit that grows on a tree | fruit
banana | a long yellow fruit | fruit
lemon | a sour yellow fruit | fruit
carrot | an orange vegetable that grows under the ground | vegetable
potato | a vegetable that grows under the ground | vegetable
bread | a food that is baked from flour and water | food
cheese | a food that is made from milk | milk
butter | a soft yellow food that is made from cream | food
honey | a sweet food that bees make | bees
salt | a white powder that gives food its taste | food
milk | a white drink that comes from cows | drink
tea | a hot drink that is made from leaves | drink
coffee | a hot drink that is made from roasted beans | drink
hammer | a tool for hitting nails | tool
saw | a tool for cutting wood | tool
spade | a tool for digging | tool
needle | a thin piece of metal for sewing | sewing
knife | a tool with a blade for cutting | cutting
spoon | a tool for eating soup | eating
key | a piece of metal that opens a lock | lock
clock | a device that shows the time | time
lamp | a device that gives light | light
mirror | a glass in which you see yourself | glass
candle | a stick of wax that gives light when it burns | light
umbrella | a thing that keeps the rain off you | rain
coat | a garment that keeps you warm outside | garment
shoe | a thing that you wear on your foot | foot
hat | a thing that you wear on your head | head
glove | a garment for the hand | hand
chair | a piece of furniture to sit on | sit
bed | a piece of furniture to sleep in | sleep
table | a piece of furniture with a flat top | furniture
bicycle | a vehicle with two wheels that you pedal | vehicle
car | a vehicle with four wheels and an engine | vehicle
train | a vehicle that runs on rails | rails
ship | a large boat that crosses the sea | boat
plane | a machine that flies and carries people | flies
doctor | a person who helps sick people | person
teacher | a person who helps others to learn | person
farmer | a person who grows food and keeps animals | person
baker | a person who makes bread | bread
pilot | a person who flies a plane | person
sailor | a person who works on a ship | person
tailor | a person who makes clothes | clothes
king | a man who rules a country | rules
queen | a woman who rules a country | rules
thief | a person who steals | steals
school | a place where children learn | learn
library | a place where books are kept and lent | books
hospital | a place where sick people are cared for | sick
market | a place where people buy and sell things | buy
kitchen | a room where food is cooked | food
farm | a place where food is grown and animals are kept | place
museum | a place where old and interesting things are shown | place
castle | a large strong building where a king or a lord lived | building
bridge | a thing that carries a road over a river | river
river | a long stream of water that flows to the sea | water
lake | a large body of water with land around it | water
island | a piece of land with water all around it | land
mountain | a very high hill | hill
desert | a dry place where little grows | dry
forest | a large place full of trees | trees
volcano | a mountain that throws out fire and hot rock | mountain
sun | the star that gives the earth light and heat | star
moon | the body that moves around the earth and shines at night | earth
star | a light in the sky at night | sky
rain | water that falls from the clouds | water
snow | frozen water that falls from the clouds in white flakes | frozen
ice | frozen water | water
wind | air that moves | air
year | a time of twelve months | months
week | a time of seven days | days
hour | a time of sixty minutes | minutes
minute | a time of sixty seconds | seconds
triangle | a shape with three sides | sides
square | a shape with four equal sides | sides
circle | a round shape | round
piano | an instrument with black and white keys | instrument
drum | an instrument that you hit | instrument
violin | an instrument with four strings and a bow | instrument
letter | a message that is written on paper and sent | message
map | a picture of a place that shows the way | place
book | pages with writing that are bound together | pages
dictionary | a book that says what words mean | book
noun | a word that names a thing, a person or a place | word
verb | a word that says what somebody does | word
adjective | a word that says what something is like | word
friend | a person whom you like and trust | person
uncle | the brother of your father or mother | brother
aunt | the sister of your father or mother | sister
cousin | a child of your uncle or aunt | child
grandmother | the mother of your father or mother | mother
neighbour | a person who lives next to you | person
birthday | the day on which you were born | born
breakfast | the first meal of the day | meal
lunch | the meal in the middle of the day | meal
dinner | the main meal of the day | meal
"""

DEFINITIONS: dict[str, tuple[str, str]] = {}
"""Word to its definition, and a word that no right answer lacks."""
for _line in _LINES.strip().split("\n"):
    _word, _definition, _needed = _line.split(" | ")
    DEFINITIONS[_word] = (_definition, _needed)
