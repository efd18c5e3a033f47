"""Slow reference implementations that the tests compare the package with.

Everything is written from the mathematical specification with plain loops in float64, and nothing here imports the
package. Section numbers in the docstrings are those of the specification.

Conventions: ``N`` cells, ``G`` genes, ``P`` proteins, ``C`` known classes; codes are 0-based integers; weight matrices
are ``(out, in)``; variances are variances and standard deviations are called ``sd`` or ``scale``.
"""

import math
import warnings

import numpy as np
import scipy.integrate
import scipy.stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture


def _float(value):
    """Float64 copy of an array, a list, a number or a detached CPU tensor.

    Spec 0 (conventions only).
    """
    return np.array(value, dtype=np.float64)


def _elementwise(function, *arrays):
    """Broadcast the arrays, then call a scalar function once per entry.

    Spec 0 (conventions only).
    """
    arrays = np.broadcast_arrays(*[_float(array) for array in arrays])
    out = np.empty(arrays[0].shape, dtype=np.float64)
    for index in np.ndindex(*out.shape):
        out[index] = function(*[float(array[index]) for array in arrays])
    return out


def _log_sigmoid(t):
    """Return log of the logistic function of one number, which is -softplus(-t).

    Spec 0, identity -log sigma(m) = sp(-m).
    """
    if t >= 0:
        return -math.log1p(math.exp(-t))
    return t - math.log1p(math.exp(t))


def _sigmoid(t):
    """Logistic function of one number.

    Spec 0.
    """
    return math.exp(_log_sigmoid(t))


def _log_add_exp(a, b):
    """Return log(exp(a) + exp(b)) for two numbers, either of which may be minus infinity.

    Spec 2.5.
    """
    largest = max(a, b)
    if largest == -math.inf:
        return -math.inf
    return largest + math.log(math.exp(a - largest) + math.exp(b - largest))


# ---------------------------------------------------------------------------------------------------------------------
# Likelihoods
# ---------------------------------------------------------------------------------------------------------------------


def _nb_one(x, mu, theta):
    """Log probability of one count under NB with mean ``mu`` and inverse dispersion ``theta``.

    Spec 2.1 with no epsilon; success probability theta / (theta + mu), number of successes theta.
    """
    return float(scipy.stats.nbinom.logpmf(x, theta, theta / (theta + mu)))


def nb_log_prob(x, mu, theta):
    """Negative binomial log probability of every entry (arrays are broadcast), no epsilon inside the logs.

    Spec 2.1: mean mu, variance mu + mu^2 / theta; loses digits below mu / theta = 1e-8, see nb_log_prob_products.
    """
    return _elementwise(_nb_one, x, mu, theta)


def nb_log_prob_products(x, mu, theta):
    """Negative binomial log probability of whole counts by products, accurate for any mu > 0 and theta > 0.

    Spec 2.1: lgamma(x + theta) - lgamma(theta) is the sum over j < x of log(theta + j); x! is a sum of logs too.
    """

    def one(x_, mu_, theta_):
        count = round(x_)
        if count != x_ or count < 0:
            raise ValueError(f"{x_} is not a count")
        terms = [-theta_ * math.log1p(mu_ / theta_)]
        for j in range(count):
            terms.append(math.log((theta_ + j) / (j + 1)))
            terms.append(math.log(mu_ / (theta_ + mu_)))
        return math.fsum(terms)

    return _elementwise(one, x, mu, theta)


def zinb_log_prob(x, mu, theta, zi_logits):
    """Zero-inflated NB log probability of every entry; ``zi_logits`` are the logits of an extra zero.

    Spec 2.2: P(x) = sigma(pi) [x = 0] + (1 - sigma(pi)) NB(x).
    """

    def one(x_, mu_, theta_, logit):
        counts = _log_sigmoid(-logit) + _nb_one(x_, mu_, theta_)
        if x_ == 0:
            return _log_add_exp(_log_sigmoid(logit), counts)
        return counts

    return _elementwise(one, x, mu, theta, zi_logits)


def poisson_log_prob(x, mu):
    """Poisson log probability of every entry.

    Spec 2.3.
    """
    return _elementwise(lambda x_, mu_: float(scipy.stats.poisson.logpmf(x_, mu_)), x, mu)


def normal_log_prob(x, mean, sd):
    """Gaussian log density of every entry; the third argument is the standard deviation, not the variance.

    Spec 2.4.
    """
    return _elementwise(lambda x_, mean_, sd_: float(scipy.stats.norm.logpdf(x_, mean_, sd_)), x, mean, sd)


def nb_mixture_log_prob(y, mu_back, mu_fore, phi, background_logits):
    """Two-component NB mixture log probability of every entry; logits are those of the BACKGROUND component.

    Spec 2.5: sigma(m) NB(y; mu_back, phi) + (1 - sigma(m)) NB(y; mu_fore, phi), mu_fore being the foreground mean.
    """

    def one(y_, back, fore, phi_, logit):
        background = _log_sigmoid(logit) + _nb_one(y_, back, phi_)
        foreground = _log_sigmoid(-logit) + _nb_one(y_, fore, phi_)
        return _log_add_exp(background, foreground)

    return _elementwise(one, y, mu_back, mu_fore, phi, background_logits)


def nb_mean_var(mu, theta):
    """Mean and variance of NB, as two arrays.

    Spec 2.1: mu and mu + mu^2 / theta.
    """
    return _elementwise(lambda m, t: m, mu, theta), _elementwise(lambda m, t: m + m * m / t, mu, theta)


def zinb_mean_var(mu, theta, zi_logits):
    """Mean and variance of ZINB, as two arrays.

    Spec 2.2: (1 - s) mu and (1 - s) mu (mu + theta + s mu theta) / theta with s = sigma(zi_logits).
    """

    def mean(m, t, logit):
        return (1.0 - _sigmoid(logit)) * m

    def variance(m, t, logit):
        s = _sigmoid(logit)
        return (1.0 - s) * m * (m + t + s * m * t) / t

    return _elementwise(mean, mu, theta, zi_logits), _elementwise(variance, mu, theta, zi_logits)


def mixture_mean(mu_back, mu_fore, background_logits):
    """Mean of the two-component NB mixture; logits are those of the background component.

    Spec 2.5: s mu_back + (1 - s) mu_fore with s = sigma(background_logits).
    """

    def one(back, fore, logit):
        s = _sigmoid(logit)
        return s * back + (1.0 - s) * fore

    return _elementwise(one, mu_back, mu_fore, background_logits)


# ---------------------------------------------------------------------------------------------------------------------
# Calculus
# ---------------------------------------------------------------------------------------------------------------------


def numerical_gradient(function, array, step=1e-6):
    """Gradient of the SUM of ``function(array)`` (a number or an array) with respect to every entry of ``array``.

    Spec 2.1 (gradient checks): central differences with step ``step * max(1, |entry|)``, differenced before summing.
    """
    array = _float(array)
    gradient = np.empty(array.shape, dtype=np.float64)
    for index in np.ndindex(*array.shape):
        width = step * max(1.0, abs(float(array[index])))
        above = array.copy()
        below = array.copy()
        above[index] += width
        below[index] -= width
        # The distance really used, after rounding of the two arguments.
        distance = float(above[index]) - float(below[index])
        # Entries of the result that do not depend on this argument cancel exactly instead of adding rounding noise.
        difference = np.ravel(_float(function(above)) - _float(function(below)))
        gradient[index] = math.fsum(float(value) for value in difference) / distance
    return gradient


def softmax(a):
    """Softmax over the last axis, row by row.

    Spec 1.2 (scale head).
    """
    a = _float(a)
    if a.ndim > 1:
        return np.stack([softmax(row) for row in a])
    largest = max(float(value) for value in a)
    exponentials = [math.exp(float(value) - largest) for value in a]
    total = math.fsum(exponentials)
    return np.array([value / total for value in exponentials])


def log_softmax(a):
    """Log of the softmax over the last axis, row by row.

    Spec 2.1 (numerics: log mu = log library + log_softmax).
    """
    a = _float(a)
    if a.ndim > 1:
        return np.stack([log_softmax(row) for row in a])
    largest = max(float(value) for value in a)
    log_total = math.log(math.fsum(math.exp(float(value) - largest) for value in a))
    return np.array([float(value) - largest - log_total for value in a])


def kl_normal(mean, var, prior_mean, prior_var):
    """KL(N(mean, var) || N(prior_mean, prior_var)) of four numbers by quadrature; the arguments are VARIANCES.

    Spec 2.7: integral of q log(q / p) over 15 standard deviations of q on each side (the rest is below 1e-45).
    """
    mean, sd = float(mean), math.sqrt(float(var))
    prior_mean, prior_sd = float(prior_mean), math.sqrt(float(prior_var))

    def integrand(t):
        value = mean + sd * t
        log_q = scipy.stats.norm.logpdf(value, mean, sd)
        log_p = scipy.stats.norm.logpdf(value, prior_mean, prior_sd)
        return scipy.stats.norm.pdf(t) * (log_q - log_p)

    result, _ = scipy.integrate.quad(integrand, -15.0, 15.0, epsabs=1e-12, epsrel=1e-11, limit=500)
    return float(result)


def kl_categorical(q, p):
    """KL(q || p) of two probability vectors, terms with q = 0 being 0.

    Spec 2.7: sum over the classes of q (log q - log p).
    """
    total = 0.0
    for q_c, p_c in zip(_float(q), _float(p), strict=True):
        if q_c > 0.0:
            total += float(q_c) * (math.log(q_c) - math.log(p_c))
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Objectives for one cell
# ---------------------------------------------------------------------------------------------------------------------


def unlabelled_bound(
    log_px,
    log_py,
    log_qz,
    log_pz_by_class,
    kl_u_by_class,
    class_probabilities,
    class_prior,
    kl_library=0.0,
    kl_background=0.0,
    kl_weight=1.0,
):
    """Evidence lower bound (to be MAXIMISED) of one unlabelled cell; ``kl_weight`` w never touches log_px, log_py.

    Spec 3.8: w multiplies [log q(z|x) - sum q_c log p(z|u_c,c) + sum q_c KL_u_c + KL_c], KL_background and KL_library.
    """
    group = float(log_qz)
    for c in range(len(class_probabilities)):
        q_c = float(class_probabilities[c])
        group -= q_c * float(log_pz_by_class[c])
        group += q_c * float(kl_u_by_class[c])
    group += kl_categorical(class_probabilities, class_prior)
    group += float(kl_background)
    group += float(kl_library)
    return float(log_px) + float(log_py) - float(kl_weight) * group


def labelled_bound(
    log_px,
    log_py,
    log_qz,
    log_pz_by_class,
    kl_u_by_class,
    label,
    class_prior,
    kl_library=0.0,
    kl_background=0.0,
    kl_weight=1.0,
):
    """Evidence lower bound (to be MAXIMISED) of one cell with known ``label``, without the classification term.

    Spec 3.8: w multiplies [log q(z|x) - log p(z|u_c,c) + KL_u_c - log p(c)] at c = label, KL_background and KL_library.
    """
    label = int(label)
    group = float(log_qz)
    group -= float(log_pz_by_class[label])
    group += float(kl_u_by_class[label])
    group -= math.log(float(class_prior[label]))
    group += float(kl_background)
    group += float(kl_library)
    return float(log_px) + float(log_py) - float(kl_weight) * group


def cell_bound(
    log_px,
    log_py,
    log_qz,
    log_pz_by_class,
    kl_u_by_class,
    class_probabilities,
    class_prior,
    label=None,
    kl_library=0.0,
    kl_background=0.0,
    kl_weight=1.0,
):
    """Bound of one cell according to its own label: None or -1 means unlabelled (see the two functions above).

    Spec 3.8: minimise minus the mean of this over the minibatch (plus alpha times the cross-entropy, not included).
    """
    shared = {"kl_library": kl_library, "kl_background": kl_background, "kl_weight": kl_weight}
    before = (log_px, log_py, log_qz, log_pz_by_class, kl_u_by_class)
    if label is None or int(label) == -1:
        return unlabelled_bound(*before, class_probabilities, class_prior, **shared)
    return labelled_bound(*before, label, class_prior, **shared)


def class_weights_W(labels, q, n_classes):
    """Class weights (N, C): the one-hot label of a labelled cell, ``q`` of an unlabelled one (label -1).

    Spec 3.8 (vectorised selection).
    """
    weights = np.zeros((len(labels), n_classes))
    for n in range(len(labels)):
        for c in range(n_classes):
            if int(labels[n]) == -1:
                weights[n, c] = float(q[n][c])
            elif int(labels[n]) == c:
                weights[n, c] = 1.0
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# Panels, protein input, background prior
# ---------------------------------------------------------------------------------------------------------------------


def panel_mask(counts, panel_codes, n_panels=None):
    """Boolean (n_panels, P): a protein is measured in a panel if one of its cells has a count that is not 0 or NaN.

    Spec 3.5 (mask); a panel without cells has measured nothing, and a cell without proteins is a row of NaN.
    """
    counts = _float(counts)
    codes = [int(code) for code in panel_codes]
    if n_panels is None:
        n_panels = max(codes) + 1
    mask = np.zeros((n_panels, counts.shape[1]), dtype=bool)
    for n in range(counts.shape[0]):
        for t in range(counts.shape[1]):
            if not math.isnan(counts[n, t]) and counts[n, t] != 0:
                mask[codes[n], t] = True
    return mask


def protein_input(y, measured):
    """Return log1p(y / (1 + mean of the cell's measured proteins)), 0 where not measured; both arguments (N, P).

    Spec 1.4, with the mean over measured proteins only; ``measured`` all true gives the mean over every column.
    """
    y = _float(y)
    out = np.zeros(y.shape)
    for n in range(y.shape[0]):
        total = 0.0
        n_measured = 0
        for t in range(y.shape[1]):
            if measured[n][t]:
                total += float(y[n, t])
                n_measured += 1
        if n_measured == 0:
            continue
        for t in range(y.shape[1]):
            if measured[n][t]:
                out[n, t] = math.log1p(float(y[n, t]) / (1.0 + total / n_measured))
    return out


def gmm_two_component(values, random_state=0):
    """Mean and sd of the lower component of a two-Gaussian mixture fitted to one cell; ``values`` are log1p already.

    Spec 3.5 (empirical prior): sklearn defaults, (0, 0.05) if the fit gives a ConvergenceWarning (constant cell).
    """
    column = _float(values).reshape(-1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            mixture = GaussianMixture(n_components=2, random_state=random_state).fit(column)
        except ConvergenceWarning:
            return 0.0, 0.05
    lower = 0 if mixture.means_[0, 0] <= mixture.means_[1, 0] else 1
    return float(mixture.means_[lower, 0]), math.sqrt(float(mixture.covariances_[lower, 0, 0]))


def background_prior(counts, panel_codes, n_panels, measured):
    """Empirical prior (mean A, sd S), each of shape (n_panels,), from ALL given cells instead of 100 random draws.

    Spec 3.5: A = mean m_i, S = sqrt(sum s_i^2) / n cells; no cells (0, 1), < 5 proteins (0, 0.05); counts are raw.
    """
    counts = _float(counts)
    means = np.zeros(n_panels)
    sds = np.ones(n_panels)
    for panel in range(n_panels):
        # Cells without proteins (NaN in a measured column) cannot be fitted and do not count as cells.
        columns = [t for t in range(counts.shape[1]) if measured[panel][t]]
        cells = []
        for n in range(counts.shape[0]):
            if int(panel_codes[n]) == panel and not any(math.isnan(counts[n, t]) for t in columns):
                cells.append(n)
        if len(cells) == 0:
            continue
        if len(columns) < 5:
            means[panel], sds[panel] = 0.0, 0.05
            continue
        sum_of_means = 0.0
        sum_of_variances = 0.0
        for n in cells:
            m, s = gmm_two_component([math.log1p(float(counts[n, t])) for t in columns])
            sum_of_means += m
            sum_of_variances += s * s
        means[panel] = sum_of_means / len(cells)
        sds[panel] = math.sqrt(sum_of_variances) / len(cells)
    return means, sds


# ---------------------------------------------------------------------------------------------------------------------
# Networks in eval mode
# ---------------------------------------------------------------------------------------------------------------------


def one_hot(codes, n_categories):
    """One-hot block (N, n_categories) of 0-based codes.

    Spec 0.1.
    """
    out = np.zeros((len(codes), n_categories))
    for n in range(len(codes)):
        out[n, int(codes[n])] = 1.0
    return out


def _linear(row, weight, bias):
    """Return weight @ row + bias for one cell, one output unit at a time.

    Spec 0.1, step 2.
    """
    out = []
    for j in range(weight.shape[0]):
        if weight.shape[1] != len(row):
            raise ValueError(f"the weight has {weight.shape[1]} input columns, the input has {len(row)}")
        out.append(math.fsum(float(weight[j, i]) * row[i] for i in range(len(row))) + float(bias[j]))
    return out


def _batch_norm_eval(row, norm, eps):
    """Batch norm of one cell from running statistics, with affine parameters.

    Spec 0.1, step 3 (eval mode).
    """
    out = []
    for j in range(len(row)):
        scaled = (row[j] - float(norm["running_mean"][j])) / math.sqrt(float(norm["running_var"][j]) + eps)
        out.append(scaled * float(norm["weight"][j]) + float(norm["bias"][j]))
    return out


def _layer_norm(row, eps):
    """Layer norm of one cell over its units (population variance), without affine parameters.

    Spec 0.1, step 4.
    """
    mean = math.fsum(row) / len(row)
    variance = math.fsum((value - mean) ** 2 for value in row) / len(row)
    return [(value - mean) / math.sqrt(variance + eps) for value in row]


def fc_stack(
    h,
    codes_onehot,
    weights,
    biases,
    norms=None,
    layer_norm=False,
    activation=True,
    inject=True,
    batch_norm_eps=1e-3,
    layer_norm_eps=1e-5,
):
    """Fully connected stack in eval mode; ``norms``: per layer None or {weight, bias, running_mean, running_var}.

    Spec 0.1: [h, one-hots] (blocks of width 1 dropped), linear, batch norm, layer norm, ReLU, no dropout, per layer.
    """
    h = _float(h)
    blocks = [_float(block) for block in codes_onehot]
    blocks = [block for block in blocks if block.shape[1] > 1]
    if norms is None:
        norms = [None] * len(weights)
    cells = []
    for n in range(h.shape[0]):
        row = [float(value) for value in h[n]]
        for i in range(len(weights)):
            if i == 0 or inject:
                for block in blocks:
                    row = row + [float(value) for value in block[n]]
            row = _linear(row, _float(weights[i]), _float(biases[i]))
            if norms[i] is not None:
                row = _batch_norm_eval(row, norms[i], batch_norm_eps)
            if layer_norm:
                row = _layer_norm(row, layer_norm_eps)
            if activation:
                row = [max(value, 0.0) for value in row]
        cells.append(row)
    return np.array(cells)


def encode(
    x,
    codes_onehot,
    weights,
    biases,
    norms,
    mean_weight,
    mean_bias,
    var_weight,
    var_bias,
    layer_norm=False,
    inject=True,
    var_floor=1e-4,
):
    """Posterior (mean, variance), each (N, D), of the Gaussian encoder in eval mode; ``var_floor=0`` for p(z|u,c).

    Spec 0.2: h = FC(x), mean = A_m h + a_m, variance = exp(A_v h + a_v) + 1e-4; ``x`` is the transformed input.
    """
    h = fc_stack(x, codes_onehot, weights, biases, norms, layer_norm=layer_norm, inject=inject)
    means = []
    variances = []
    for n in range(h.shape[0]):
        row = [float(value) for value in h[n]]
        means.append(_linear(row, _float(mean_weight), _float(mean_bias)))
        variances.append([math.exp(v) + var_floor for v in _linear(row, _float(var_weight), _float(var_bias))])
    return np.array(means), np.array(variances)


# ---------------------------------------------------------------------------------------------------------------------
# Classification metrics
# ---------------------------------------------------------------------------------------------------------------------


def accuracy(true, predicted):
    """Fraction of cells whose predicted label is the true one (labelled cells only are to be passed).

    Spec 4 (history keys: micro accuracy).
    """
    true = np.asarray(true).tolist()
    predicted = np.asarray(predicted).tolist()
    if len(true) != len(predicted):
        raise ValueError("true and predicted differ in length")
    correct = 0
    for n in range(len(true)):
        if true[n] == predicted[n]:
            correct += 1
    return correct / len(true)


def macro_f1(true, predicted):
    """Unweighted mean of the per-class F1 over the classes that occur among the true or the predicted labels.

    Spec 4 (micro F1 would equal the accuracy); a class never hit has F1 = 0; labelled cells only are to be passed.
    """
    true = np.asarray(true).tolist()
    predicted = np.asarray(predicted).tolist()
    if len(true) != len(predicted):
        raise ValueError("true and predicted differ in length")
    classes = sorted(set(true) | set(predicted))
    total = 0.0
    for c in classes:
        both = only_true = only_predicted = 0
        for n in range(len(true)):
            if true[n] == c and predicted[n] == c:
                both += 1
            elif true[n] == c:
                only_true += 1
            elif predicted[n] == c:
                only_predicted += 1
        total += 2.0 * both / (2.0 * both + only_true + only_predicted)
    return total / len(classes)


def expected_calibration_error(probabilities, labels, n_bins=15):
    """Sum over bins of (fraction of cells in the bin) * |accuracy - mean confidence|; equal-width bins (low, high].

    Spec 4 (history keys: calibration error); confidence = largest probability, prediction = its first position.
    """
    if len(probabilities) != len(labels):
        raise ValueError("probabilities and labels differ in length")
    n_cells = len(labels)
    confidences = []
    hits = []
    for n in range(n_cells):
        best = 0
        for c in range(len(probabilities[n])):
            if probabilities[n][c] > probabilities[n][best]:
                best = c
        confidences.append(float(probabilities[n][best]))
        hits.append(1.0 if int(labels[n]) == best else 0.0)
    total = 0.0
    for k in range(n_bins):
        inside = [n for n in range(n_cells) if k / n_bins < confidences[n] <= (k + 1) / n_bins]
        if not inside:
            continue
        bin_accuracy = math.fsum(hits[n] for n in inside) / len(inside)
        bin_confidence = math.fsum(confidences[n] for n in inside) / len(inside)
        total += len(inside) / n_cells * abs(bin_accuracy - bin_confidence)
    return total
