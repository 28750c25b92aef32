"""For mkdocs: links of a notebook to files of the repository outside nbs/ lead to the repository, since the site does not hold them."""
import re

OUTSIDE = re.compile(r'href="(?:\.\./)+([A-Z][\w.-]*|data/[^"/]+\.\w+|(?:medvlm3d|reports|runs|tests)/[^"]*)"')


def on_page_content(html, page, config, files):
    "The page's HTML with such links as `repo_url`/blob/main/PATH."
    return OUTSIDE.sub(lambda m: f'href="{config["repo_url"]}/blob/main/{m[1]}"', html)
