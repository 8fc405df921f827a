#pragma once

double gradient_norm_in_first_unit();
